"""The names of each kind's tensors in sd-scripts and LyCORIS, and in diffusers and peft.

The two families of names differ for LoRA alone; LoHa and LoKr tensors are called the same in both. OFT has a name in
peft only: the `oft_blocks` of other tools rotate a layer's outputs, peft rotates its inputs. Such blocks are read, and
so are changes of biases and of normalisations (`diff_b`, `w_norm`, `b_norm`), but never written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from sdtrain.adapters.formats.conventions import OTHER_SPELLINGS, SUFFIXES, Names
from sdtrain.adapters.kinds import (
    AdapterWeights,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    is_beyond_layers,
    kind_of,
    whole,
)

TUCKER = ("lora_mid.weight", "hada_t1", "hada_t2", "lokr_t1", "lokr_t2")
"""Parts of Tucker's decomposition of convolutions, which is multiplied out on reading."""


def expressible(weights: AdapterWeights, names: Names) -> bool:
    """Return whether a family of names has words for this kind of adapter."""
    if names == "diffusers" and isinstance(weights, DoraWeights) and weights.on_inputs:
        return False
    if is_beyond_layers(weights):
        return False
    if isinstance(weights, OftWeights) and (weights.on_outputs or weights.terms):
        return False
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
        if weights.on_inputs:
            found[key] = weights.magnitude.reshape(1, -1, *[1] * (dimensions - 2))
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
    if any(name in parts for name in TUCKER):
        return _nothing_left(_tucker(parts, alpha), parts)
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
    if "oft_blocks" in parts:
        return _nothing_left(_rotation_of_outputs(parts, alpha), parts)
    if "diff" in parts:
        return _nothing_left(DiffWeights(_take(parts, "diff", sides=1), _take_row(parts, "diff_b")), parts)
    if "w_norm" in parts:
        return _nothing_left(DiffWeights(_take(parts, "w_norm", sides=1), _take_row(parts, "b_norm")), parts)
    raise ValueError(f"has `{next(iter(parts), 'alpha')}`, which belongs to no kind of adapter known here")


def _decode_lora(parts: dict[str, Tensor], names: Names, alpha: float | None) -> AdapterWeights:
    words = SUFFIXES[names]
    down, up = _take(parts, words["down"]), _take(parts, words["up"])
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"has a down matrix of rank {down.shape[0]} and an up matrix of rank {up.shape[1]}")
    lora = LoraWeights(down, up, _or_rank(alpha, down))
    of_peft = SUFFIXES["diffusers"]["magnitude"]  # which stands for outputs whatever its shape, in any name's company
    if names == "sd-scripts" and of_peft in parts:
        names, words = "diffusers", SUFFIXES["diffusers"]
    if words["magnitude"] not in parts:
        return _nothing_left(lora, parts)
    magnitude = _take(parts, words["magnitude"], sides=1)
    width = down.shape[1] if down.dim() > 1 else 0
    if names == "sd-scripts" and magnitude.shape[0] == 1 < magnitude.dim() and magnitude.numel() == width:
        return _nothing_left(DoraWeights(lora, magnitude.reshape(-1), on_inputs=True), parts)
    if magnitude.numel() != up.shape[0] or (names == "sd-scripts" and magnitude.shape[0] != up.shape[0]):
        raise ValueError("has a `dora_scale` that is neither one for each output nor one for each input")
    return _nothing_left(DoraWeights(lora, magnitude.reshape(-1)), parts)


def _rotation_of_outputs(parts: dict[str, Tensor], alpha: float | None) -> OftWeights:
    """Return the rotation that `oft_blocks` (blocks, size, size) of sd-scripts and LyCORIS mean.

    Q = B - B^T in each block, and if alpha > 0 no longer than alpha * outputs over all of them (COFT); W + dW = R^T W
    with R = (I + Q)(I - Q)^-1, which is Cayley's transform of Q from the left. `rescale` is a length for each output.
    """
    blocks = _take(parts, "oft_blocks", sides=3)
    if blocks.dim() > 3 or blocks.shape[1] != blocks.shape[2]:
        what = "a butterfly (BOFT), which is not known here" if blocks.dim() == 4 else "which is no square"
        raise ValueError(f"has `oft_blocks` of shape {list(blocks.shape)}, {what}")
    size = blocks.shape[1]
    skew = blocks.float() - blocks.float().transpose(1, 2)
    limit, norm = (alpha or 0.0) * blocks.shape[0] * size, float(skew.norm())
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    rows, columns = torch.triu_indices(size, size, 1)
    return OftWeights(skew[:, rows, columns], size, on_outputs=True, lengths=_take_row(parts, "rescale"))


def _tucker(parts: dict[str, Tensor], alpha: float | None) -> AdapterWeights:
    """Return a decomposed convolution multiplied out, as a LoRA or as the change itself.

    LoCon: dW[o, i] = up[o, a] mid[a, b] down[b, i], of which mid and down make the down matrix. LoHa and LoKr, whose
    cores have (rank, rank, kh, kw): W[o, i] = core[a, b] first[a, o] second[b, i] (LyCORIS, arXiv 2309.14859, sec. 3).
    """
    if "lora_mid.weight" in parts:
        down, up = _take(parts, "lora_down.weight"), _take(parts, "lora_up.weight")
        mid = _take(parts, "lora_mid.weight", sides=3)
        if mid.shape[:2] != (up.shape[1], down.shape[0]):
            raise ValueError(f"has a `lora_mid.weight` of shape {list(mid.shape)}, which does not fit its matrices")
        core = torch.einsum("ab...,bi->ai...", mid.float(), down.float().flatten(1)).to(down.dtype)
        return LoraWeights(core, up, _or_rank(alpha, core))
    if "hada_t1" in parts:
        left, rank = _core(parts, "hada_t1", "hada_w1_a", "hada_w1_b")
        right, _ = _core(parts, "hada_t2", "hada_w2_a", "hada_w2_b")
        if left.shape != right.shape:
            raise ValueError(f"has factors of shapes {list(left.shape)} and {list(right.shape)}, where one belongs")
        return DiffWeights((1.0 if alpha is None else alpha / rank) * left * right)
    second, rank = _core(parts, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
    first = whole(_take_factor(parts, "lokr_w1"))
    scale = 1.0 if alpha is None else alpha / rank
    return DiffWeights(scale * torch.kron(first.view(*first.shape, *[1] * (second.dim() - 2)), second.contiguous()))


def _core(parts: dict[str, Tensor], core: str, first: str, second: str) -> tuple[Tensor, int]:
    """Return a convolution in float32, made of its core and two matrices, and its rank."""
    found = _take(parts, core, sides=3), _take(parts, first), _take(parts, second)
    t, a, b = (tensor.float() for tensor in found)
    if t.shape[:2] != (a.shape[0], b.shape[0]):
        raise ValueError(f"has a `{core}` of shape {list(t.shape)}, which does not fit its matrices")
    return torch.einsum("ab...,ao,bi->oi...", t, a, b), b.shape[0]


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


def _take_row(parts: dict[str, Tensor], name: str) -> Tensor | None:
    """Take out a part with a number for each output, None where it is not there."""
    return _take(parts, name, sides=1).reshape(-1) if name in parts else None


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
    if made != wanted:
        return f"is for a layer of shape {made}, this model's has {wanted}"
    rows = {"rescale": weights.lengths} if isinstance(weights, OftWeights) else {}
    rows |= {"a bias": weights.bias} if isinstance(weights, DiffWeights) else {}
    wrong = [(name, row) for name, row in rows.items() if row is not None and len(row) != wanted[0]]
    return f"has {wrong[0][0]} of {len(wrong[0][1])} numbers for {wanted[0]} outputs" if wrong else None


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
            width = weights.vectors.shape[0] * weights.block_size
            if weights.on_outputs:
                return (width, *wanted[1:])
            flat = (wanted[0], width)
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
