"""A run that compiles nothing does not import PyTorch's compiler, and whoever wants it gets it as ever."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sdtrain.commands.starting.uncompiled import mark
from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml

RUN = """
import sys
from sdtrain.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("imported" if "torch._dynamo" in sys.modules else "spared")
"""
IMPORTS = """
import sys
from sdtrain.commands.starting.uncompiled import unmarked
with unmarked():
    from diffusers.models.attention import BasicTransformerBlock
    from torch.optim import SGD, Adam
    {meanwhile}
import torch
"""
EVER = """
assert "_dynamo" not in vars(torch)
adam = Adam([torch.nn.Parameter(torch.ones(2))])
adam.load_state_dict(adam.state_dict())
adam.zero_grad()
assert "torch._dynamo" not in sys.modules
import torch._dynamo
assert torch._dynamo.disable.__module__ == "torch._dynamo.decorators"
assert torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(1)) == 2
"""
HELD = """
assert "torch._dynamo" not in sys.modules
assert held.config is sys.modules["torch._dynamo.config"] and held.utils is torch._dynamo.utils
assert held.reset is torch._dynamo.reset, "its file ran twice"
assert torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(1)) == 2
"""
ASKED = """
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.disable.__module__ == "torch._dynamo.decorators"
assert torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(1)) == 2
"""


@pytest.mark.parametrize(
    ("meanwhile", "then"),
    [("pass", EVER), ("import torch._dynamo; torch._dynamo.reset()", ASKED), ("import torch._dynamo as held", HELD)],
    ids=["nobody-asks", "somebody-asks", "somebody-asks-later"],
)
def test_the_compiler_is_the_one_it_always_is_once_somebody_wants_it(meanwhile: str, then: str) -> None:
    subprocess.run([sys.executable, "-c", IMPORTS.format(meanwhile=meanwhile) + then], check=True)


def test_an_import_that_fails_leaves_nothing_in_the_place_of_the_compiler() -> None:
    text = IMPORTS.format(meanwhile="raise ValueError").replace("with unmarked():", "try:\n  with unmarked():")
    text = text.replace("import torch\n", "except ValueError:\n  import torch\nassert '_dynamo' not in vars(torch)\n")
    subprocess.run([sys.executable, "-c", text + "assert 'torch._dynamo' not in sys.modules\n"], check=True)


def ended(*words: str) -> str:
    """Run a command in a process of its own; return whether it imported the compiler."""
    done = subprocess.run([sys.executable, "-c", RUN, *words], check=True, capture_output=True, text=True)
    return done.stdout.split()[-1]


def test_what_compiles_nothing_ends_without_the_compiler(table: dict[str, Any], tmp_path: Path) -> None:
    table |= {"steps": 1, "preview": table["preview"] | {"every": 1}, "checkpoint": {"every": 1}}
    config = tmp_path / "config.toml"
    config.write_text(config_to_toml(resolve(table, "test")), encoding="utf-8")
    assert ended("fit", str(config)) == "spared"
    run = tmp_path / "runs" / "small"
    for source in (run, run / "weights" / "small.safetensors"):
        assert ended("sample", str(source), "--prompt", "a red circle", "--seed", "0", "--steps", "1") == "spared"
    assert ended("cache", str(config)) == "spared"


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_a_quantised_base_finds_all_that_its_packages_ask_for(table: dict[str, Any], tmp_path: Path) -> None:
    table |= {"steps": 1, "model": table["model"] | {"base_precision": "int8"}}
    config = tmp_path / "config.toml"
    config.write_text(config_to_toml(resolve(table, "test")), encoding="utf-8")
    assert ended("fit", str(config)) == "imported"
    assert ended("sample", str(tmp_path / "runs" / "small"), "--prompt", "red", "--seed", "0", "--steps", "1")


def test_its_modules_are_those_that_its_file_imports_whichever_is_asked_for_first() -> None:
    then = """
module = sys.modules["torch._dynamo.utils"]
assert module is torch._dynamo.utils and module.__spec__.name == module.__name__
assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
assert torch._dynamo.exc.counters is torch._dynamo.utils.counters, "there are two of them"
"""
    meanwhile = "import torch._dynamo.utils; assert torch._dynamo.utils"
    subprocess.run([sys.executable, "-c", IMPORTS.format(meanwhile=meanwhile) + then + ASKED], check=True)


def test_a_mark_returns_what_it_marks_however_it_is_written() -> None:
    def function() -> int:
        return 7

    assert mark(function) is function and mark(function, False, wrapping=False) is function
    assert mark(recursive=False)(function) is function and mark()(function) is function
