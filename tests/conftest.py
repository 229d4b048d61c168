"""Small runs on the embedded model, for every test that trains."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors are slower on several, and forks may hang
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anybody imports Triton: kernels then run on the CPU

SIZES = [(64, 64), (96, 64), (64, 96), (130, 90), (64, 64), (64, 64)]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small pictures of several shapes, each with a caption."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(SIZES):
        picture = Image.new("RGB", size, (40 * index, 255 - 40 * index, 128))
        ImageDraw.Draw(picture).ellipse((10, 10, 40, 50), fill=(255, 30 * index, 0))
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a red thing number {index}", encoding="utf-8")
    return folder


@pytest.fixture
def table(tmp_path: Path, pictures: Path) -> dict[str, Any]:
    """The plain config of a run that takes a few seconds: 96 px, rank 2, four steps."""
    return small_run(tmp_path, pictures)


def small_run(tmp_path: Path, pictures: Path) -> dict[str, Any]:
    return {
        "name": "small",
        "output": str(tmp_path / "runs"),
        "steps": 4,
        "model": {"path": "builtin:tiny-sdxl"},
        "method": {"kind": "lora", "rank": 2, "alpha": 4.0, "targets": "attention"},
        "data": {
            "resolution_px": 96,
            "bucket_step_px": 32,
            "batch_size": 2,
            "cache": str(tmp_path / "cache"),
            "folder": [{"path": str(pictures)}],
        },
        "optimizer": {"prodigy_steps": 0, "d0": 1e-3},
        "preview": {"every": 0, "prompts": ["a red circle"], "seeds": [0], "num_inference_steps": 2},
        "checkpoint": {"every": 0},
    }


def merged(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The table with dotted settings changed."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
    for path, value in changes.items():
        *folders, last = path.split(".")
        inner = result
        for name in folders:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return result


def one_in(num: int, cases: Iterable[Any]) -> list[Any]:
    """Return the cases of a test with all but each so many-th, from the first on, marked slow."""

    def slow(case: Any) -> Any:
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)

    return [case if at % num == 0 else slow(case) for at, case in enumerate(cases)]


@pytest.fixture
def train(table: dict[str, Any]) -> Callable[..., tuple[Path, str]]:
    """Runs a config to its end; returns the run's folder and what was printed. Keywords are dotted settings."""

    def run(
        changes: dict[str, Any] | None = None, *, resume: bool = False, watchers: Sequence[Callable[..., None]] = ()
    ) -> tuple[Path, str]:
        from rich.console import Console

        from sdtrain.commands.fit import fit
        from sdtrain.config.read import resolve

        config = resolve(merged(table, changes or {}), "test config")
        text = io.StringIO()
        console = Console(file=text, width=200)
        folder = fit(config, resume=resume, watchers=watchers, console=console).folder
        return folder, text.getvalue()

    return run
