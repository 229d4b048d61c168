"""How often the change of an adapter file counts: in general, and for single networks and blocks. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

MOST = 1000.0
"""The largest weight; what is beyond it was not meant."""


@dataclass(frozen=True)
class Share:
    """The weight of one file.

    parts: patterns and their weights in order, of which the last that fits counts instead of `general`. A pattern is
    the name of a network, or a shell pattern over whole names of layers, as in `method.layer_weights`, with the
    network before them or not: `text_encoder`, `down_blocks.*`, `unet.*attn2*`.
    """

    general: float = 1.0
    parts: tuple[tuple[str, float], ...] = ()

    def of(self, component: str, module: str) -> float:
        """Return the weight of a layer."""
        fitting = [weight for pattern, weight in self.parts if _fits(pattern, component, module)]
        return fitting[-1] if fitting else self.general

    def text(self) -> str:
        """Return the share as `share_of` reads it: `0.8,mid_block.*=0`."""
        return ",".join([f"{self.general:g}", *(f"{pattern}={weight:g}" for pattern, weight in self.parts)])


def _fits(pattern: str, component: str, module: str) -> bool:
    return pattern == component or fnmatchcase(module, pattern) or fnmatchcase(f"{component}.{module}", pattern)


def share_of(text: str) -> Share:
    """Return the share that a text means: `0.8`, or `0.8,text_encoder=0.5,down_blocks.*=0`.

    Raises ValueError with a sentence about what is wrong in it.
    """
    general, parts = 1.0, []
    for number, piece in enumerate(text.split(",")):
        pattern, is_part, value = piece.strip().rpartition("=")
        if is_part and not pattern.strip():
            raise ValueError(f"has `{piece.strip()}`, which names no network and no layers; write down_blocks.*=0.5")
        if not is_part and number > 0:
            raise ValueError(f"has `{piece.strip()}` behind a comma; only the first is for all: write unet={value}")
        weight = _weight(value)
        if is_part:
            parts.append((pattern.strip(), weight))
        else:
            general = weight
    return Share(general, tuple(parts))


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MOST:
        raise ValueError(f"has `{text.strip()[:40]}`, which is no weight; use a number such as 0.8")
    return weight


def unmatched(share: Share, layers: Mapping[str, Iterable[str]]) -> list[str]:
    """Return a sentence for each pattern that means no layer of a model, with the names that come near.

    layers: the names of the layers of each network.
    """
    every = [(component, module) for component, modules in layers.items() for module in modules]
    blocks = {*layers, *(f"{block_of(component, module)}.*" for component, module in every if component == "unet")}
    found = []
    for pattern, _ in share.parts:
        if not any(_fits(pattern, *layer) for layer in every):
            near = get_close_matches(pattern, sorted(blocks), n=3, cutoff=0.5)
            advice = " or ".join(f"`{one}`" for one in near) or "`down_blocks.*`"
            found.append(f"`{pattern}` is no network and no layer of this model; did you mean {advice}?")
    return found


def block_of(component: str, module: str) -> str:
    """Return the block of a layer of the U-Net, as `down_blocks.1`, `mid_block` or `conv_in`; else its network."""
    if component != "unet":
        return component
    first, _, rest = module.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ("down_blocks", "up_blocks") else first
