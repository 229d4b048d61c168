"""`sdtrain merge`: a base model with LoRAs put into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.merge import merge_into
from sdtrain.config.schema import ModelConfig
from sdtrain.errors import UserError
from sdtrain.families.metadata import Resolution, native_resolution, resolution_of
from sdtrain.families.modelspec import Description
from sdtrain.models.checkpoints.inspect import inspect_model, stated_metadata
from sdtrain.models.checkpoints.locate import locate, open_checkpoint
from sdtrain.models.load import load_model
from sdtrain.models.model import Layout, Model

CPU = torch.device("cpu")


def open_model(path: str, components: str = "") -> Model:
    """A model on the CPU, its networks in float32. Raises UserError."""
    config = ModelConfig(path=path, components=components)
    _, problems = inspect_model(config)
    if problems:
        raise UserError(path, problems)
    return load_model(config, device=CPU, dtype=torch.float32)


def trained_size(base: str, model: Model) -> Resolution:
    """The size of the pictures a base model was made for: what its file says, or else that of its family."""
    checkpoint = open_checkpoint(locate(base, ""), "")
    said = resolution_of(stated_metadata(checkpoint))
    return said or native_resolution(checkpoint.family, predicts_v=model.prediction == "v_prediction")


def merge(base: str, files: Sequence[tuple[Path, float]], out: Path, layout: Layout, components: str = "") -> int:
    """Write `base` with adapter files merged in, each times its weight; how many layers changed. Raises UserError."""
    model = open_model(base, components)
    adapters = [(read_lora(path, model.networks).adapters, weight) for path, weight in files]
    changed = merge_into(model.networks, adapters)
    model.write_checkpoint(out, Description(title=out.stem, resolution_px=trained_size(base, model)), layout=layout)
    return changed
