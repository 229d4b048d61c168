"""Alphas in the forms that other tools can hold: one per network, multiplied into matrices, or listed in the header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor

from sdtrain.adapters.formats.metadata import ALPHA_KEY, _json, json_table, number_of
from sdtrain.adapters.formats.tensor_names import encode
from sdtrain.adapters.kinds import (
    Adapters,
    AdapterWeights,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    mapped,
)


def pack_alphas(alphas: Mapping[str, Mapping[str, float]], adapters: Mapping[str, Collection[str]]) -> str:
    """Return component -> module -> alpha as JSON.

    Where all modules of a network are listed, the commonest alpha stands once, under `*`.
    """
    packed = {}
    for component, modules in alphas.items():
        rest = dict(modules)
        if set(rest) == set(adapters[component]):
            common = most_frequent(rest.values())
            rest = {"*": common} | {name: alpha for name, alpha in rest.items() if alpha != common}
        packed[component] = rest
    return _json(packed)


def unpack_alpha(metadata: Mapping[str, str], component: str, module: str) -> float | None:
    """Return the alpha that `pack_alphas` kept for a module, None where there is none."""
    modules = json_table(metadata, ALPHA_KEY).get(component, {})
    if not isinstance(modules, dict):
        raise ValueError(f"cannot be read: `{ALPHA_KEY}` in the header has no table for {component}")
    value = modules.get(module, modules.get("*"))
    return None if value is None else number_of(value, ALPHA_KEY)


def most_frequent(values: Iterable[float]) -> float:
    """Return the value that occurs most often, the largest of several, so that no order changes the answer."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


@dataclass(frozen=True)
class Scaled:
    """Adapters whose alphas a format can hold.

    alphas: component -> module -> the alpha before, where that can be undone exactly.
    """

    adapters: dict[str, dict[str, AdapterWeights]]
    alphas: dict[str, dict[str, float]]


def one_alpha_each(adapters: Adapters, dtype: torch.dtype | None) -> Scaled:
    """Return the same dW with one alpha in each network, the most frequent one.

    Kinds other than LoRA and DoRA keep theirs. dtype: the type that tensors will be stored in, None for their own.
    """
    found: dict[str, dict[str, AdapterWeights]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for component, modules in adapters.items():
        common = most_frequent(weights.alpha for weights in modules.values())
        found[component] = {}
        for module, weights in modules.items():
            stored = cast(weights, dtype)
            differs = weights.alpha != common and isinstance(weights, LoraWeights | DoraWeights)
            if differs and undoable(stored, common):
                alphas.setdefault(component, {})[module] = weights.alpha
                stored = rescaled(stored, common)
            elif differs:
                stored = cast(rescaled(weights, common), dtype)  # rounded once, after the multiplication
            found[component][module] = stored
    return Scaled(found, alphas)


def scale_of_one(adapters: Adapters, dtype: torch.dtype | None) -> Scaled:
    """Return the same dW with alpha = rank, or everything as it was where that would lose a bit anywhere.

    dtype: the type that tensors will be stored in, None for their own.
    """
    stored = {
        component: {module: cast(weights, dtype) for module, weights in modules.items()}
        for component, modules in adapters.items()
    }
    every = [weights for modules in stored.values() for weights in modules.values()]
    if not all(undoable(weights, _unscaled_alpha(weights)) for weights in every):
        return Scaled(stored, {})
    unscaled = {
        component: {module: rescaled(weights, _unscaled_alpha(weights)) for module, weights in modules.items()}
        for component, modules in stored.items()
    }
    if all(weights.alpha == _unscaled_alpha(weights) for weights in every):
        return Scaled(unscaled, {})
    alphas = {
        component: {name: weights.alpha for name, weights in modules.items()} for component, modules in stored.items()
    }
    return Scaled(unscaled, alphas)


def _unscaled_alpha(weights: AdapterWeights) -> float:
    return float(weights.rank or 1)  # a LoKr of whole factors has no rank, and no use for its alpha


def rescaled(weights: AdapterWeights, alpha: float) -> AdapterWeights:
    """Return the same dW with another alpha: one of the factors makes up for it."""

    def scaled(factor: Tensor) -> Tensor:
        return factor if weights.alpha == alpha else (factor.float() * (weights.alpha / alpha)).to(factor.dtype)

    match weights:
        case LoraWeights():
            return replace(weights, up=scaled(weights.up), alpha=alpha)
        case DoraWeights():
            direction = rescaled(weights.direction, alpha)
            assert isinstance(direction, LoraWeights)
            return replace(weights, direction=direction)
        case LohaWeights():
            return replace(weights, w1_a=scaled(weights.w1_a), alpha=alpha)
        case LokrWeights():
            if not weights.rank:
                return replace(weights, alpha=alpha)
            w1 = weights.w1
            return replace(weights, w1=(scaled(w1[0]), w1[1]) if isinstance(w1, tuple) else scaled(w1), alpha=alpha)
        case OftWeights() | DiffWeights():
            return weights
        case _:
            assert_never(weights)


def undoable(weights: AdapterWeights, alpha: float) -> bool:
    """Return whether rescaling to this alpha and back gives the same bits."""
    before = encode(weights, "diffusers")
    after = encode(rescaled(rescaled(weights, alpha), weights.alpha), "diffusers")
    return all(torch.equal(after[part], tensor) for part, tensor in before.items())


def cast(weights: AdapterWeights, dtype: torch.dtype | None) -> AdapterWeights:
    """Return the adapter with its tensors in another type; None keeps theirs."""
    return weights if dtype is None else mapped(weights, lambda tensor: tensor.to(dtype))
