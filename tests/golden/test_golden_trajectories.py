"""Thirty steps of every method, against numbers kept from before: a change of structure changes no behaviour.

After a change that is meant to move them: `python tests/golden/test_golden_trajectories.py` writes the numbers anew.
Say in the commit why they moved.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).parent
NUMBERS = HERE / "trajectories.json"
STEPS = 30
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-text-encoders": {
        "method.train": ["unet", "text_encoder", "text_encoder_2"],
        "data.caption_dropout": 0.3,
        "optimizer.preset": "lora",
    },
    "full": {"method": {"kind": "full"}, "optimizer.d0": 1e-5},
    "lora-bfloat16": {"model.dtype": "bfloat16"},
}
TOLERANCES = {"lora-bfloat16": 1e-2}
"""Relative. AVX-512, AVX2 and SSE4 differ by up to 9e-7 in float32, and by up to 4e-3 in bfloat16."""

Train = Callable[[dict[str, Any]], Path]
Trajectory = dict[str, dict[str, list[float]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("method", METHODS)
def test_thirty_steps_are_those_of_before(world: Path, method: str) -> None:
    kept: Mapping[str, Trajectory] = json.loads(NUMBERS.read_text(encoding="utf-8"))
    now = trajectory(world, method)
    tolerance = TOLERANCES.get(method, 1e-5)
    assert {kind: sorted(rows) for kind, rows in now.items()} == {
        kind: sorted(rows) for kind, rows in kept[method].items()
    }
    for kind, rows in kept[method].items():
        for name, values in rows.items():
            near = 1e-3 if kind == "preview" else tolerance  # a pixel has 256 values: one step of one is 4e-3
            assert now[kind][name] == pytest.approx(values, rel=near), f"{kind} of {name}"


def make_world(folder: Path) -> Path:
    """The model and the pictures of all trajectories."""
    sys.path.insert(0, str(HERE))
    try:
        import world as maker
    finally:
        sys.path.remove(str(HERE))
    maker.write_model(folder / "model")
    maker.write_pictures(folder / "pictures")
    return folder


def trajectory(world: Path, method: str) -> Trajectory:
    """Losses, step sizes and a summary of the weights of one run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as output:
            return _trajectory(_train(world, Path(output), METHODS[method]))
    finally:
        torch.set_num_threads(threads)


def _train(world: Path, output: Path, changes: Mapping[str, Any]) -> Path:
    from sdtrain.commands.fit import fit
    from sdtrain.config.read import resolve

    table: dict[str, Any] = {
        "name": "golden",
        "output": str(output),
        "steps": STEPS,
        "model": {"path": str(world / "model")},
        "method": {"kind": "lora", "rank": 4, "alpha": 2.0, "targets": "all-linear"},
        "data": {
            "resolution_px": 64,
            "bucket_step_px": 32,
            "batch_size": 2,
            "folder": [{"path": str(world / "pictures"), "missing_captions": "empty"}],
        },
        "optimizer": {"d0": 1e-4, "prodigy_steps": 25},
        "preview": {"every": STEPS, "prompts": ["a cat", "a tree"], "seeds": [0], "num_inference_steps": 4},
        "checkpoint": {"every": 0},
        "export": {"dtype": "float32"},
    }
    for path, value in changes.items():
        *folders, last = path.split(".")
        inner = table
        for folder in folders:
            inner = inner[folder]
        inner[last] = value
    return fit(resolve(table, "golden config")).folder


def _trajectory(run: Path) -> Trajectory:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [line for line in lines if "groups" in line]
    groups = records[0]["groups"]
    parameters = load_file(run / "checkpoints" / f"step-{STEPS:06d}" / "parameters.safetensors")
    weights = load_file(run / "weights" / "golden.safetensors")
    picture = _alone(Image.open(run / "previews" / f"step-{STEPS:06d}.png").convert("RGB"))
    pixels = torch.tensor(list(picture.resize((8, 8)).tobytes()), dtype=torch.float64)
    return {
        "losses": {"loss": [record["loss"] for record in records]},
        "d": {name: [record["groups"][name]["d"] for record in records] for name in groups},
        "effective_lr": {name: [record["groups"][name]["effective_lr"] for record in records] for name in groups},
        "training weights": summary(parameters),
        "exported weights": summary(weights),
        "preview": {"mean pixel": [float(pixels.mean())]},
    }


def _alone(grid: Image.Image) -> Image.Image:
    """The grid as it was before the base's pictures stood beside it, of which the numbers were taken."""
    from sdtrain.training.watching.grid import LABEL_PX, labelled_grid

    side = grid.width // 2
    tops = [LABEL_PX + row * (side + 2 * LABEL_PX) + 2 * LABEL_PX for row in range(2)]
    rows = [[grid.crop((side, top, 2 * side, top + side))] for top in tops]
    return labelled_grid(rows, ["a cat", "a tree"], [0], f"golden, step {STEPS}")


def summary(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Of all tensors, and of those of each network: how many, their length, and their length against a fixed wave."""
    rows: dict[str, list[torch.Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            rows.setdefault(name.replace("/", ".").split(".")[0].split("_lora")[0][:24], []).append(tensor.double())
    return {name: _measure(found) for name, found in rows.items()}


def _measure(tensors: list[torch.Tensor]) -> list[float]:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    length = float(flat.norm())
    wave = torch.cos(torch.arange(len(flat), dtype=torch.float64) * 0.7)
    against = float(flat @ wave)
    return [float(len(tensors)), length, math.hypot(length, against)]


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        place = make_world(Path(folder))
        found = {method: trajectory(place, method) for method in METHODS}
    NUMBERS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
