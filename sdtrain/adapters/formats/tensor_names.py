"""The names of each kind's tensors in sd-scripts and LyCORIS, and in diffusers and peft.

The two families of names differ for LoRA alone; LoHa and LoKr tensors are called the same in both. OFT has a name in
peft only: the `oft_blocks` of other tools rotate a layer's outputs, peft rotates its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, assert_never

import torch
from torch import Tensor

from sdtrain.adapters.kinds import (
    AdapterWeights,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    kind_of,
)

Names = Literal["sd-scripts", "diffusers"]

SUFFIXES: Mapping[Names, Mapping[str, str]] = {
    "sd-scripts": {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"},
    "diffusers": {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
}
"""What is called differently; every other part has its name in both."""

OTHER_SPELLINGS = {
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}
"""Names that earlier diffusers wrote, and what they are called now."""

TUCKER = ("lora_mid.weight", "hada_t1", "hada_t2", "lokr_t1", "lokr_t2")
"""Parts of a decomposition of convolutions that has no counterpart here."""


def expressible(weights: AdapterWeights, names: Names) -> bool:
    """Return whether a family of names has words for this kind of adapter."""
    return not isinstance(weights, OftWeights if names == "sd-scripts" else DiffWeights)


def encode(weights: AdapterWeights, names: Names) -> dict[str, Tensor]:
    """Return part's name -> tensor; alpha is a float32 scalar, and only sd-scripts names have a part for it.

    A `diff` has none in either, for nothing scales it.
    """
    parts = _parts(weights)
    found = {SUFFIXES[names].get(part, part): tensor for part, tensor in parts.items()}
    if isinstance(weights, DoraWeights):
        dimensions = weights.direction.down.dim()
        key = SUFFIXES[names]["magnitude"]
        found[key] = _magnitude_shape(weights.magnitude, dimensions, names)
    if names == "sd-scripts" and not isinstance(weights, DiffWeights):
        found["alpha"] = torch.tensor(weights.alpha, dtype=torch.float32)
    return found


def _parts(weights: AdapterWeights) -> dict[str, Tensor]:
    match weights:
        case LoraWeights():
            return {"down": weights.down, "up": weights.up}
        case DoraWeights():
            return {**_parts(weights.direction), "magnitude": weights.magnitude}
        case LohaWeights():
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            return dict(zip(names, (weights.w1_a, weights.w1_b, weights.w2_a, weights.w2_b), strict=True))
        case LokrWeights():
            return _factor("lokr_w1", weights.w1) | _factor("lokr_w2", weights.w2)
        case OftWeights():
            return {"oft_R.weight": weights.vectors}
        case DiffWeights():
            return {"diff": weights.change}
        case _:
            assert_never(weights)


def _factor(name: str, factor: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    if isinstance(factor, tuple):
        return {f"{name}_a": factor[0], f"{name}_b": factor[1]}
    return {name: factor}


def _magnitude_shape(magnitude: Tensor, dimensions: int, names: Names) -> Tensor:
    """Return the shape of a magnitude (out,) in files: (out, 1, ...) for LyCORIS, whose readers see the axis by it.

    peft has (1, out, 1, 1) for convolutions.
    """
    if names == "sd-scripts":
        return magnitude.reshape(-1, *[1] * (dimensions - 1))
    return magnitude.reshape(-1) if dimensions == 2 else magnitude.reshape(1, -1, 1, 1)


def decode(parts: Mapping[str, Tensor], names: Names, alpha: float | None = None) -> AdapterWeights:
    """Return the adapter that the parts of one layer make.

    alpha: for files that keep it elsewhere; with neither, the scale is 1. Raises ValueError with a sentence about
    what is missing or unknown.
    """
    parts = {OTHER_SPELLINGS.get(name, name): tensor for name, tensor in parts.items()}
    if "alpha" in parts:
        alpha = _number(parts.pop("alpha"))
    for name in TUCKER:
        if name in parts:
            raise ValueError(f"has `{name}`, a Tucker decomposition, which is not read here")
    words = SUFFIXES[names]
    if words["down"] in parts or words["up"] in parts:
        return _decode_lora(parts, names, alpha)
    if "hada_w1_a" in parts:
        w1_a, w1_b, w2_a, w2_b = (_take(parts, f"hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return _nothing_left(LohaWeights(w1_a, w1_b, w2_a, w2_b, _or_rank(alpha, w1_b)), parts)
    if any(name.startswith("lokr_") for name in parts):
        factors = _take_factor(parts, "lokr_w1"), _take_factor(parts, "lokr_w2")
        unscaled = LokrWeights(*factors, alpha=1.0)
        return _nothing_left(LokrWeights(*factors, alpha=float(unscaled.rank or 1) if alpha is None else alpha), parts)
    if "oft_R.weight" in parts:
        vectors = _take(parts, "oft_R.weight")
        return _nothing_left(OftWeights(vectors, (1 + math.isqrt(1 + 8 * vectors.shape[-1])) // 2), parts)
    if "diff" in parts:
        return _nothing_left(DiffWeights(_take(parts, "diff")), parts)
    raise ValueError(f"has `{next(iter(parts), 'alpha')}`, which belongs to no kind of adapter known here")


def _decode_lora(parts: dict[str, Tensor], names: Names, alpha: float | None) -> AdapterWeights:
    words = SUFFIXES[names]
    down, up = _take(parts, words["down"]), _take(parts, words["up"])
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"has a down matrix of rank {down.shape[0]} and an up matrix of rank {up.shape[1]}")
    lora = LoraWeights(down, up, _or_rank(alpha, down))
    if words["magnitude"] not in parts:
        return _nothing_left(lora, parts)
    magnitude = _take(parts, words["magnitude"], sides=1)
    if magnitude.numel() != up.shape[0] or (names == "sd-scripts" and magnitude.shape[0] != up.shape[0]):
        raise ValueError("has a `dora_scale` for each input; only those for each output are read here")
    return _nothing_left(DoraWeights(lora, magnitude.reshape(-1)), parts)


def _or_rank(alpha: float | None, factor: Tensor) -> float:
    return float(factor.shape[0]) if alpha is None else alpha


def _number(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"has an `alpha` of shape {list(tensor.shape)}, where one number belongs")
    return float(tensor)


def _take(parts: dict[str, Tensor], name: str, *, sides: int = 2) -> Tensor:
    """Take a part out. sides: how many its shape has at least. Raises ValueError where it cannot be such a part."""
    if name not in parts:
        raise ValueError(f"lacks `{name}`")
    tensor = parts.pop(name)
    if tensor.dim() < sides or not tensor.numel():
        raise ValueError(f"has `{name}` of shape {list(tensor.shape)}, which is no matrix of an adapter")
    if not tensor.is_floating_point():
        raise ValueError(f"has `{name}` in {str(tensor.dtype).removeprefix('torch.')}, where fractions belong")
    return tensor


def _take_factor(parts: dict[str, Tensor], name: str) -> Tensor | tuple[Tensor, Tensor]:
    if name in parts:
        return _take(parts, name)
    return _take(parts, f"{name}_a"), _take(parts, f"{name}_b")


def _nothing_left(weights: AdapterWeights, parts: Mapping[str, Tensor]) -> AdapterWeights:
    if parts:
        raise ValueError(f"has `{next(iter(parts))}` beside its {kind_of(weights)} matrices")
    return weights


def shape_problem(weights: AdapterWeights, base: Tensor) -> str | None:
    """Return why the adapter cannot sit on a layer with this weight, None if it can."""
    wanted = tuple(base.shape)
    made = _shape_made(weights, wanted)
    if made == wanted:
        return None
    return f"is for a layer of shape {made}, this model's has {wanted}"


def _shape_made(weights: AdapterWeights, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of dW; kinds that only know a flat width get the layer's own shape where the width fits."""
    match weights:
        case LoraWeights():
            return (weights.up.shape[0], *weights.down.shape[1:])
        case DoraWeights():
            return _shape_made(weights.direction, wanted)
        case LohaWeights():
            flat = (weights.w1_a.shape[0], weights.w1_b.shape[1])
        case LokrWeights():
            (out1, in1), second = factor_shape(weights.w1), factor_shape(weights.w2)
            flat = (out1 * second[0], in1 * math.prod(second[1:]))
        case OftWeights():
            flat = (wanted[0], weights.vectors.shape[0] * weights.block_size)
        case DiffWeights():
            return tuple(weights.change.shape)
        case _:
            assert_never(weights)
    return wanted if flat == (wanted[0], math.prod(wanted[1:])) else flat


def factor_shape(factor: Tensor | tuple[Tensor, Tensor]) -> tuple[int, ...]:
    """Return the shape of a Kronecker factor, be it multiplied out or kept as a product."""
    if isinstance(factor, tuple):
        return (factor[0].shape[0], factor[1].shape[1])
    return tuple(factor.shape)
