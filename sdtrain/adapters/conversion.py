"""Adapters of any kind as ordinary LoRAs, or as the change itself: the forms that every tool reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from sdtrain.adapters.kinds import (
    Adapters,
    AdapterWeights,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    delta,
    kind_of,
)
from sdtrain.adapters.layers import plain_modules
from sdtrain.adapters.low_rank import RankRule, approximate
from sdtrain.adapters.quantised.layer import original_weight
from sdtrain.errors import user_error

Form = Literal["native", "lora", "diff"]
"""`native`: the kind as it was trained. `lora`: two matrices. `diff`: dW itself."""


@dataclass
class Converted:
    """Adapters in another form, and how much of the change is lost in it."""

    adapters: dict[str, dict[str, AdapterWeights]] = field(default_factory=dict)
    squared_change: float = 0.0
    """The sum of |dW|^2 over all layers, Frobenius."""
    squared_loss: float = 0.0
    """The sum of |dW - what is kept|^2."""

    @property
    def error(self) -> float:
        """|dW - kept| / |dW| over all layers together; 0 where nothing is lost."""
        return (self.squared_loss / self.squared_change) ** 0.5 if self.squared_change else 0.0


@torch.no_grad()
def converted(
    adapters: Adapters, networks: Mapping[str, nn.Module], form: Form, rule: RankRule, strength: float = 1.0
) -> Converted:
    """Return adapters in a form, with their change times `strength`.

    `networks` hold the weights below the adapters, which DoRA and OFT depend on: those that are packed are read again.

    A LoRA is left as it is in the form `lora`, whatever the rule: nothing would be gained. Layers are converted one
    after another where their weights are, in float32, and come back on the CPU. Raises UserError for a strength that
    the form cannot hold: DoRA and OFT have no factor that scales what they do.
    """
    found = Converted()
    for component, modules in adapters.items():
        layers = dict(plain_modules(networks[component])) if form != "native" else {}
        found.adapters[component] = {}
        for module, weights in modules.items():
            if form == "native" or (form == "lora" and isinstance(weights, LoraWeights)):
                found.adapters[component][module] = scaled(weights, strength)
                continue
            base = original_weight(layers[module])
            found.adapters[component][module] = _layer(found, strength * delta(weights, base.detach()), form, rule)
    return found


def scaled(weights: AdapterWeights, strength: float) -> AdapterWeights:
    """Return an adapter of the same kind with dW times `strength`. Raises UserError for DoRA and OFT."""
    if strength == 1:
        return weights

    def times(factor: Tensor) -> Tensor:
        return (factor.float() * strength).to(factor.dtype)

    match weights:
        case LoraWeights():
            return replace(weights, up=times(weights.up))
        case LohaWeights():
            return replace(weights, w1_a=times(weights.w1_a))
        case LokrWeights():
            w1 = weights.w1
            return replace(weights, w1=(times(w1[0]), w1[1]) if isinstance(w1, tuple) else times(w1))
        case DiffWeights():
            return DiffWeights(times(weights.change), None if weights.bias is None else times(weights.bias))
        case DoraWeights() | OftWeights():
            what = f"{strength:g}, but {kind_of(weights)} has no factor that scales it: add --form lora or diff"
            raise user_error("export", "--strength", what)
        case _:
            assert_never(weights)


def _layer(found: Converted, change: Tensor, form: Literal["lora", "diff"], rule: RankRule) -> AdapterWeights:
    found.squared_change += float(change.double().square().sum())
    match form:
        case "lora":
            lora = approximate(change, rule)
            found.squared_loss += float((change - lora.delta()).double().square().sum())
            return LoraWeights(lora.down.cpu(), lora.up.cpu(), lora.alpha)
        case "diff":
            return DiffWeights(change.cpu())
        case _:
            assert_never(form)
