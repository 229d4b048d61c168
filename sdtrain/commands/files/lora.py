"""Reads and merges LoRA files for people who work with diffusers pipelines in Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from sdtrain.adapters.formats.lora_file import LoraFile, read_lora
from sdtrain.adapters.merge import merge_into
from sdtrain.families.words import TRAINABLE_NETWORKS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_lora(path: Path | str, target: DiffusionPipeline | Mapping[str, nn.Module]) -> LoraFile:
    """Return the adapters in a LoRA file of any tool, by network and layer; nothing is changed.

    Every kind and naming that sdtrain knows is read, with the alphas as they were trained.

    Args:
        path: a .safetensors file.
        target: a diffusers pipeline, or its networks by name (`unet`, `text_encoder`, `text_encoder_2`), on any device.

    Raises:
        UserError: the file is damaged or no adapter, or its layers or shapes are not those of the networks.
    """
    return read_lora(Path(path), _networks(target))


def merge_lora(path: Path | str, target: DiffusionPipeline | Mapping[str, nn.Module], weight: float = 1.0) -> int:
    """Add a LoRA file, times a weight, to a pipeline's or networks' weights in place; return how many layers changed.

    Kinds that diffusers cannot load, such as LoHa, LoKr and OFT, work too, for each becomes a change of the
    weights. Only loading the weights again brings those of before back.

    Raises:
        UserError: see `load_lora`; then nothing was changed.
    """
    networks = _networks(target)
    return merge_into(networks, [(read_lora(Path(path), networks).adapters, weight)])


def _networks(target: DiffusionPipeline | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    parts = target if isinstance(target, Mapping) else target.components
    return {name: parts[name] for name in TRAINABLE_NETWORKS if isinstance(parts.get(name), nn.Module)}
