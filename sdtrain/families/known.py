"""All families that are known, and how to tell which of them a model is of."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sdtrain.families.family import Family
from sdtrain.families.sd import SD1, SD2
from sdtrain.families.sdxl import SDXL
from sdtrain.families.words import Component

FAMILIES: dict[str, Family] = {family.name: family for family in (SDXL, SD1, SD2)}
FIRST_LAYER = "input_blocks.0.0.weight"
"""The key of the U-Net's first layer, below the family's prefix, which every single file has."""


def family_of_file(names: Collection[str]) -> Family | None:
    """Return the family of a single file by the names of its tensors; None where it is no whole checkpoint."""
    for family in FAMILIES.values():
        prefixes = tuple(encoder.prefix for encoder in family.text_encoders)
        if family.unet_prefix + FIRST_LAYER in names and any(name.startswith(prefixes) for name in names):
            return family
    return None


def family_of_folder(parts: Collection[str], unet: Mapping[str, object], pipeline: str) -> Family | None:
    """Return the family of a diffusers folder; None for one with more text encoders than any family has.

    Args:
        parts: the names of its sub-folders.
        unet: the U-Net's configuration.
        pipeline: the class that `model_index.json` names, which decides where only one family has it.
    """
    named = [family for family in FAMILIES.values() if family.words.pipeline == pipeline]
    if len(named) == 1:
        return named[0]
    num_encoders = max(1, len([part for part in parts if part.startswith("text_encoder")]))
    linear = bool(unet.get("use_linear_projection"))
    for family in FAMILIES.values():
        if len(family.text_encoders) == num_encoders and family.linear_projections in (None, linear):
            return family
    return None


def family_of_networks(
    components: Collection[Component | str], *, takes_sizes: bool | None, text_widths: Collection[int]
) -> Family:
    """Return the family that networks in memory are of, be they all or some of a model's.

    Args:
        components: the names of the networks.
        takes_sizes: whether the U-Net is told sizes; None where the U-Net is not among them.
        text_widths: the widths of text that their layers read.
    """
    fitting = [
        family
        for family in FAMILIES.values()
        if set(components) <= set(family.components) and takes_sizes in (None, family.takes_sizes)
    ] or [family for family in FAMILIES.values() if set(components) <= set(family.components)]
    fitting.sort(key=lambda family: len(family.text_encoders))
    return next(
        (family for family in fitting if family.text_width in text_widths),
        next((family for family in fitting if not family.text_width), fitting[0]),
    )
