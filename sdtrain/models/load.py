"""The one place that chooses which family's class trains a model that was opened."""

from __future__ import annotations

from typing import assert_never

import torch

from sdtrain.config.schema import ModelConfig
from sdtrain.matmul import multiply_fast
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.model import Model
from sdtrain.models.sd import SD
from sdtrain.models.sdxl import SDXL


def load_model(
    opened: OpenedModel, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, caption_chunks: int = 1
) -> Model:
    """Load a model that was opened: frozen, in evaluation mode, on the CPU.

    device: where its U-Net will compute, once it is placed there. config: the settings it was opened with, for what
    the user decides instead of the model. Raises UserError for weights that do not fit.
    """
    return model_of(load_components(opened, dtype), config, device=device, caption_chunks=caption_chunks)


def model_of(components: Components, config: ModelConfig, *, device: torch.device, caption_chunks: int = 1) -> Model:
    """Return the model that components in memory make: frozen, in evaluation mode, on the CPU; see `load_model`."""
    for network in components.networks.values():
        multiply_fast(network)
    family = components.family.name
    match family:
        case "sdxl":
            return SDXL(components, config, device, caption_chunks)
        case "sd1" | "sd2":
            return SD(components, config, device, caption_chunks)
        case _:
            assert_never(family)
