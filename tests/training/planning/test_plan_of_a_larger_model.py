"""The plan of a U-Net of 114 million parameters is what is counted in a real run of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdtrain.config.schema import Config
from sdtrain.files.locations import BUILTIN_FOLDER
from tests.training.planning.test_plan import config_of, counted, peaks, traced

__all__ = ["config_of"]

SIZES = {
    "block_out_channels": [128, 256, 384],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 1, 4],
    "attention_head_dim": [8, 16, 24],
}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model around a larger U-Net of random numbers."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl", folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    shutil.rmtree(folder / "unet")
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config({**config, **SIZES})
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"data.batch_size": 3, "method.rank": 16, "preview.every": 1},
        {"memory.gradient_checkpointing": True},
        {"memory.recompute": ["mid_block.attentions.0", "up_blocks.0"]},
        {"method.adapter": "dora", "method.targets": "attention+ff"},
        {"method.kind": "full"},
        {"method.kind": "full", "memory.fused_back_pass": True},
    ],
    ids=["lora", "recomputed", "parts", "dora", "full", "fused"],
)
def test_a_plan_is_within_three_percent_of_the_truth(
    config_of: Callable[..., Config],
    larger: Path,
    changes: dict[str, Any],
) -> None:
    config = config_of({"model.path": str(larger), "data.resolution_px": 128, "data.bucket_step_px": 128, **changes})
    planned, true = peaks(traced(config)), counted(config)
    for phase, num_bytes in true.items():
        assert planned[phase] == pytest.approx(num_bytes, rel=0.03), (phase, planned, true)
