"""From a model's settings to the family that can train it."""

from __future__ import annotations

from typing import assert_never

import torch

from sdtrain.config.schema import ModelConfig
from sdtrain.models.checkpoints.locate import locate, open_checkpoint
from sdtrain.models.model import Model
from sdtrain.models.sd import load_sd
from sdtrain.models.sdxl import load_sdxl


def load_model(config: ModelConfig, *, device: torch.device, dtype: torch.dtype, caption_chunks: int = 1) -> Model:
    """The model that `config` names: frozen, in evaluation mode, its U-Net on `device`. Raises UserError."""
    family = open_checkpoint(locate(config.path, config.variant), config.variant).family
    match family:
        case "sdxl":
            return load_sdxl(config, device=device, dtype=dtype, caption_chunks=caption_chunks)
        case "sd1" | "sd2":
            return load_sd(config, device=device, dtype=dtype, caption_chunks=caption_chunks)
        case _:
            assert_never(family)
