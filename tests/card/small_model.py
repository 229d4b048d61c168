"""An SDXL-shaped model that is as small as one can be: a fake tensor takes its time whatever its size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtrain.families.sdxl import SDXL
from sdtrain.files.tensors import Planned, write_safetensors
from sdtrain.models.checkpoints.networks import empty_network

BUILTIN = Path(__file__).parents[2] / "sdtrain" / "builtin" / "tiny-sdxl"
SMALLER: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [16, 32],
        "attention_head_dim": [1, 2],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
    "vae": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
}
"""What is smaller than in the built-in model."""


def write_small_model(folder: Path) -> Path:
    """Write the model as a diffusers folder, with zeros for weights; return the folder."""
    shutil.copytree(BUILTIN, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, changes in SMALLER.items():
        path = folder / part / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps(config), encoding="utf-8")
        network = empty_network(SDXL, part, config)
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        write_safetensors(folder / part / f"{name}.safetensors", _zeros(network), {"format": "pt"})
    return folder


def _zeros(network: nn.Module) -> dict[str, Planned]:
    return {
        name: Planned(torch.float32, tuple(parameter.shape), lambda shape=parameter.shape: torch.zeros(shape))  # type: ignore[misc]
        for name, parameter in network.named_parameters()
    }
