"""`sdtrain merge`: a base model with LoRAs put into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.merge import merge_into
from sdtrain.config.schema import ModelConfig
from sdtrain.families.modelspec import Description
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.models.load import load_model
from sdtrain.models.model import Layout, Model

CPU = torch.device("cpu")


def read_model(path: str, components: str = "") -> Model:
    """A model on the CPU, its networks in float32. Raises UserError."""
    config = ModelConfig(path=path, components=components)
    return load_model(open_model(config, path), config, device=CPU, dtype=torch.float32)


def merge(base: str, files: Sequence[tuple[Path, float]], out: Path, layout: Layout, components: str = "") -> int:
    """Write `base` with adapter files merged in, each times its weight; how many layers changed. Raises UserError."""
    model = read_model(base, components)
    adapters = [(read_lora(path, model.networks).adapters, weight) for path, weight in files]
    changed = merge_into(model.networks, adapters)
    model.write_checkpoint(out, Description(title=out.stem, resolution_px=1024), layout=layout)
    return changed
