"""Several ranks on one card train the run that one trains there: all but NCCL between cards, which needs several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from tests.conftest import merged, small_run
from tests.training.rank_team import free_port

FULL = {"method": {"kind": "full", "train": ["unet"]}, "optimizer.d0": 1e-5, "model.dtype": "float32"}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"preview.every": 2, "validation.share": 0.3, "validation.every": 2, "validation.noise_levels": 1},
    "single launches": {"memory.cuda_graphs": "off"},
    "full": {**FULL, "parallel.kind": "ddp"},
    "split": {**FULL, "parallel.kind": "fsdp"},
    "split, on the host": {**FULL, "parallel.kind": "fsdp", "parallel.offload": True},
}
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_that_share_a_device_train_the_run_of_one(
    name: str, device: str, tmp_path: Path, pictures: Path
) -> None:
    settings = {
        "data.batch_size": 2,
        "data.gradient_accumulation": 3,
        "steps": 4,
        "optimizer.eps": 1e-4,
        "device": device,
        "deterministic": True,
        **RUNS[name],
    }
    runs = {}
    for size in (1, 2):
        changes = {key: value for key, value in settings.items() if size > 1 or not key.startswith("parallel.")}
        config = resolve(merged(small_run(tmp_path, pictures), {**changes, "name": f"on-{size}"}), "test config")
        path = tmp_path / f"on-{size}.toml"
        path.write_text(config_to_toml(config))
        started(path, size)
        runs[size] = tmp_path / "runs" / f"on-{size}"
    losses = [[json.loads(line).get("loss") for line in (run / "log.jsonl").open()] for run in runs.values()]
    assert [loss for loss in losses[0] if loss] == pytest.approx([loss for loss in losses[1] if loss], rel=1e-4)
    mine, theirs = (load_file(run / "weights" / f"{run.name}.safetensors") for run in runs.values())
    apart = sum(float((mine[key].double() - theirs[key].double()).square().sum()) for key in mine)
    assert apart < 1e-8 * sum(float(tensor.double().square().sum()) for tensor in mine.values())


def started(config: Path, size: int) -> None:
    """Start so many ranks of a run, and wait for their end."""
    place = {"WORLD_SIZE": str(size), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.card.rank_beside", "fit", str(config)]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **place, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(size)
    ]
    said = [rank.communicate(timeout=300)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, said[0][-2000:]
