"""`sdtrain merge`: writes a base model with LoRAs merged into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.merge import merge_into
from sdtrain.config.schema import ModelConfig
from sdtrain.errors import Problem
from sdtrain.families.metadata import resolution_of
from sdtrain.families.modelspec import Description, kept_words
from sdtrain.families.words import Resolution
from sdtrain.models.checkpoints.inspect import OpenedModel, open_model
from sdtrain.models.load import load_model
from sdtrain.models.model import Layout, Model


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    changed: int
    """The number of layers that changed."""
    left_out: tuple[Problem, ...]
    """What of the files could not be used."""


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Base:
    """A model on the CPU, with networks in float32, and what its file says of it."""

    model: Model
    resolution_px: Resolution
    """The size of the pictures that it was made for."""
    metadata: Mapping[str, str]


def read_base(path: str, components: str = "") -> tuple[Model, Resolution]:
    """Return a model on the CPU, with networks in float32, and the size of pictures it was made for.

    Raises UserError.
    """
    found = read_whole(path, components)
    return found.model, found.resolution_px


def read_whole(path: str, components: str = "") -> Base:
    """Return a model and what its file says of it. Raises UserError."""
    config = ModelConfig(path=path, components=components)
    opened = open_model(config, path)
    model = load_model(opened, config, device=CPU, dtype=torch.float32)
    return Base(model, trained_size(opened), opened.metadata)


def trained_size(opened: OpenedModel) -> Resolution:
    """Return the size of the pictures that a model was made for, by its file or else by its family."""
    size = resolution_of(opened.metadata)
    return size or opened.family.native_resolution(predicts_v=opened.prediction == "v_prediction")


def merge(
    base: str,
    files: Sequence[tuple[Path, float]],
    out: Path,
    layout: Layout,
    components: str = "",
    *,
    partial: bool = False,
) -> Merged:
    """Write `base` with adapter files merged in, each times its weight; return what was done.

    partial: whether layers that cannot be used are left out.

    The base's author and licence are kept: the result is a work made of theirs. Raises UserError.
    """
    config = ModelConfig(path=base, components=components)
    opened = open_model(config, base)
    model = load_model(opened, config, device=CPU, dtype=torch.float32)
    read = [read_lora(path, model.networks, partial=partial) for path, _ in files]
    adapters = [(file.adapters, weight) for file, (_, weight) in zip(read, files, strict=True)]
    changed = merge_into(model.networks, adapters)
    described = Description(
        title=out.stem,
        resolution_px=trained_size(opened),
        more=kept_words(opened.metadata),
    )
    model.write_checkpoint(out, described, layout=layout)
    return Merged(changed, tuple(problem for file in read for problem in file.left_out))
