"""`sdtrain merge`: writes a base model with LoRAs merged into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.merge import merge_into
from sdtrain.config.schema import ModelConfig
from sdtrain.families.metadata import resolution_of
from sdtrain.families.modelspec import Description
from sdtrain.families.words import Resolution
from sdtrain.models.checkpoints.inspect import OpenedModel, open_model
from sdtrain.models.load import load_model
from sdtrain.models.model import Layout, Model

CPU = torch.device("cpu")


def read_base(path: str, components: str = "") -> tuple[Model, Resolution]:
    """Return a model on the CPU, with networks in float32, and the size of the pictures that it was made for.

    Raises UserError.
    """
    config = ModelConfig(path=path, components=components)
    opened = open_model(config, path)
    return load_model(opened, config, device=CPU, dtype=torch.float32), trained_size(opened)


def trained_size(opened: OpenedModel) -> Resolution:
    """Return the size of the pictures that a model was made for, by its file or else by its family."""
    size = resolution_of(opened.metadata)
    return size or opened.family.native_resolution(predicts_v=opened.prediction == "v_prediction")


def merge(base: str, files: Sequence[tuple[Path, float]], out: Path, layout: Layout, components: str = "") -> int:
    """Write `base` with adapter files merged in, each times its weight; return how many layers changed.

    The base's author and licence are kept: the result is a work made of theirs. Raises UserError.
    """
    config = ModelConfig(path=base, components=components)
    opened = open_model(config, base)
    model = load_model(opened, config, device=CPU, dtype=torch.float32)
    adapters = [(read_lora(path, model.networks).adapters, weight) for path, weight in files]
    changed = merge_into(model.networks, adapters)
    described = Description(
        title=out.stem,
        resolution_px=trained_size(opened),
        author=opened.metadata.get("modelspec.author", ""),
        license=opened.metadata.get("modelspec.license", ""),
    )
    model.write_checkpoint(out, described, layout=layout)
    return changed
