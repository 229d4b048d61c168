"""Activations that are computed again in backward instead of being kept: of all of a network, or of parts of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from diffusers import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sdtrain.adapters.attach import keep_quiet
from sdtrain.config.schema import Config
from sdtrain.families.words import DENOISER
from sdtrain.models.model import Model

AGAIN = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Computes a part again in backward. Nothing in a U-Net draws from the global generator, whose state on a card would be
asked for each time."""


def recompute(network: Any) -> None:
    """Let a network keep few activations for backward, and compute the others again there."""
    match network:
        case ModelMixin():
            network.enable_gradient_checkpointing(AGAIN)
        case PreTrainedModel():  # which recomputes in training mode only; CLIP has no dropout that would notice
            network.activation_checkpointing_enable()
            network.train()
            keep_quiet(network)
        case _:
            raise TypeError(f"no known way to recompute the activations of {type(network).__name__}")


def recompute_activations(model: Model, config: Config) -> None:
    """Let the trained networks, and the U-Net through which the gradients of all go, recompute their activations."""
    for name in {DENOISER: None, **dict.fromkeys(config.method.train)}:
        recompute(model.networks[name])


def parts_of(unet: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a U-Net that recompute each for itself, by name.

    A part of a block (`down_blocks.1`) is its convolutions; its transformers (`down_blocks.1.attentions.0`) are parts
    of their own.
    """
    return {name: module for name, module in unet.named_modules() if hasattr(module, "gradient_checkpointing")}


def recompute_parts(unet: Any, names: Collection[str]) -> None:
    """Let parts of a U-Net alone compute their activations again. Raises ValueError for a name that is none."""
    parts = parts_of(unet)
    if unknown := sorted(set(names) - set(parts)):
        raise ValueError(f"has no {', '.join(unknown)}; it has {', '.join(parts)}")
    unet.enable_gradient_checkpointing(AGAIN)
    for name, part in parts.items():
        part.gradient_checkpointing = name in names  # type: ignore[assignment]


def watch_parts(unet: Any, watch: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let what parts would compute again be computed by `watch(name, layer)`, with nothing recomputed."""
    unet.enable_gradient_checkpointing()
    for name, part in parts_of(unet).items():
        part._gradient_checkpointing_func = _watched(name, watch)  # type: ignore[assignment]


def _watched(name: str, watch: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Callable[..., Any]:
    def call(layer: Callable[..., Any], *inputs: Any) -> Any:
        return watch(name, layer)(*inputs)

    return call
