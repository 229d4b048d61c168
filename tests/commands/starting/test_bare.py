"""Packages that are held back run their own file when they are asked for a name, once, and as an import would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from sdtrain.commands import libraries
from sdtrain.commands.starting.bare import CROWDED, BarePackage, hold_back

PLAIN = "import crowd.counted\ncrowd.counted.runs += 1\nname = 7\n"
REPLACED = PLAIN + (
    "import sys, types\nother = types.ModuleType(__name__)\nother.name = 8\nsys.modules[__name__] = other\n"
)
A_RUN = """
import sys
from sdtrain.commands import libraries
from sdtrain.commands.starting.bare import CROWDED
libraries.process_is_ours()
with libraries.importing_less(quantised=False):
    import sdtrain.training.fit
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.modeling_clip import CLIPTextModel
assert all(sys.modules[name].is_bare for name in CROWDED), "a run asks for a name"
import diffusers, transformers
from diffusers.models.transformers import Transformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel as same
from transformers.models import BertConfig
assert BertConfig is transformers.BertConfig
assert Transformer2DModel is same and diffusers.Transformer2DModel is same
assert transformers.CLIPTextModel is CLIPTextModel
import transformers.models as held
assert held.BertModel is transformers.BertModel
"""


@pytest.fixture
def crowd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write a package `crowd.inner` that counts how often its own file is run; return that file."""
    inner = tmp_path / "crowd" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "crowd" / "__init__.py").touch()
    (tmp_path / "crowd" / "counted.py").write_text("runs = 0\n")
    (inner / "__init__.py").write_text(PLAIN)
    (inner / "part.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield inner / "__init__.py"
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "crowd":
            del sys.modules[name]


@pytest.mark.parametrize(("text", "held"), [(PLAIN, 7), (REPLACED, 8)], ids=["itself", "another-in-its-place"])
def test_a_package_runs_its_file_when_it_is_asked_for_a_name(crowd: Path, text: str, held: int) -> None:
    crowd.write_text(text)
    hold_back("crowd.inner")
    import crowd.counted
    import crowd.inner.part

    assert (crowd.inner.part.value, crowd.counted.runs) == (3, 0)
    assert crowd.inner.__file__ == str(Path(crowd.__file__).parent / "inner" / "__init__.py")
    with pytest.raises(AttributeError):
        crowd.inner.__wrapped__  # noqa: B018  # as inspection asks
    assert crowd.counted.runs == 0
    assert crowd.inner.name == held
    from crowd.inner import name

    with pytest.raises(AttributeError):
        crowd.inner.absent  # noqa: B018
    assert (name, crowd.counted.runs) == (held, 1)


def test_all_names_of_a_package_are_those_of_its_file(crowd: Path) -> None:
    crowd.write_text(PLAIN + '__all__ = ["name"]\n')
    hold_back("crowd.inner")
    names: dict[str, object] = {}
    exec("from crowd.inner import *", names)
    assert names["name"] == 7


def test_a_package_that_has_been_imported_stays_and_one_that_is_not_there_is_left(crowd: Path) -> None:
    import_module("crowd.inner")
    hold_back("crowd.inner")
    hold_back("crowd.absent")
    assert not isinstance(sys.modules["crowd.inner"], BarePackage)
    assert "crowd.absent" not in sys.modules


def test_a_run_asks_the_crowded_packages_for_nothing_and_others_get_what_they_hold() -> None:
    subprocess.run([sys.executable, "-c", A_RUN], check=True)


def test_in_the_process_of_others_no_package_is_held_back() -> None:
    text = A_RUN.replace("libraries.process_is_ours()\n", "").partition("import sdtrain.training.fit")[0] + "pass\n"
    text += f"assert not set({CROWDED!r}) & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", text], check=True)
    assert libraries.CROWDED == CROWDED
