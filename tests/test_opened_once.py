"""Every command opens a model once, reads each header of it once, and looks it up once."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import sdtrain
from sdtrain.adapters.shares import Share
from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml

BASE = "builtin:tiny-sdxl"
ONCE = {"open_checkpoint": 1, "locate": 1, "read_header": 4}
"""Of a folder of four networks."""


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what looks at a model is called, whoever imported it under whatever module."""
    from sdtrain.files import header
    from sdtrain.models.checkpoints import locate

    for module in pkgutil.walk_packages(sdtrain.__path__, "sdtrain."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    counts: Counter[str] = Counter()
    for function in (locate.open_checkpoint, locate.locate, header.read_header):
        watch(function, counts, monkeypatch)
    return counts


def watch(function: Callable[..., Any], counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*args: Any, **settings: Any) -> Any:
        if "tiny-sdxl" in str(args[0]):  # LoRAs and weights of runs are other files
            counts[function.__name__] += 1
        return function(*args, **settings)

    for name, module in list(sys.modules.items()):
        if name.startswith("sdtrain"):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, attribute, counted)


@pytest.fixture
def run(train: Callable[..., tuple[Path, str]], counts: Counter[str]) -> Path:
    """A finished run; the counting begins after it."""
    folder, _ = train({"steps": 1, "optimizer.d0": 1e-2})
    assert counts == ONCE, "fit"
    counts.clear()
    return folder


def test_fit_and_what_is_done_with_a_run_open_the_model_once(run: Path, counts: Counter[str], tmp_path: Path) -> None:
    from sdtrain.commands.files.export import export_run
    from sdtrain.commands.sample import sample_to_files

    export_run(run, "diffusers", None, tmp_path / "other.safetensors")
    assert counts == ONCE, "export"
    counts.clear()
    sample_to_files(run, ["a cat"], [0], tmp_path / "pictures", [], Console(quiet=True))
    assert counts == ONCE, "sample"


def test_tools_open_the_model_once(run: Path, counts: Counter[str], tmp_path: Path) -> None:
    from sdtrain.adapters.low_rank import RankRule
    from sdtrain.commands.files.extract import extract_lora, resize_lora
    from sdtrain.commands.files.merge import merge

    lora = run / "weights" / "small.safetensors"
    merge(BASE, [(lora, Share())], tmp_path / "merged.safetensors", "single-file")
    assert counts == ONCE, "merge"
    counts.clear()
    resize_lora(lora, BASE, RankRule(1), tmp_path / "small.safetensors")
    assert counts == ONCE, "resize"
    counts.clear()
    tuned, words = str(tmp_path / "merged.safetensors"), BASE
    extract_lora(BASE, tuned, RankRule(2), "attention", tmp_path / "out.safetensors", words)
    assert counts["open_checkpoint"] == 1 and counts["read_header"] == 4, "extract: the base; the other lies elsewhere"


def test_check_opens_the_model_once(table: dict[str, Any], counts: Counter[str], tmp_path: Path) -> None:
    from sdtrain.commands.check import check_config

    path = tmp_path / "config.toml"
    path.write_text(config_to_toml(resolve(table, "test")), encoding="utf-8")
    check_config(path, [], Console(quiet=True))
    assert counts == ONCE
