"""DoRA on a frozen layer: every output of W + dW is given a length of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdtrain.adapters.lean.inputs import Remade, kept_of
from sdtrain.adapters.lean.lora import low_rank_gradients, scaled
from sdtrain.adapters.lean.products import POINT, Window, add_product, input_gradient, product
from sdtrain.adapters.quantised.packing import Packed, apart, in_full

PIECE = 2**22
"""Numbers of a weight that are computed at once where it is not needed whole: 16 MiB in float32."""
ALIGNED = 64
"""Pieces begin at multiples of so many rows."""


class Dora(torch.autograd.Function):
    """y = bias + magnitude / |V| * (W x + scale * up(down(x))), V = W + scale * up @ down (arXiv 2402.09353, eq. 5).

    |V| is a constant in backward, as section 4.3 of the paper has it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        weight: Tensor | Packed,
        bias: Tensor | None,
        scale: float,
        window: Window | None,
        how: Remade | None,
    ) -> Tensor:
        """Return y, (..., out) or (n, out, h, w); exactly W x + bias where the magnitude is |V| and up is zero.

        With a packed weight |V| is that of what is computed with, so that each output has its length all the same.

        magnitude: as many numbers as outputs, in any shape. The rest is as in `LowRank`.
        """
        ctx.scale, ctx.window = scale, window
        ctx.compute, kept = kept_of(inputs, how)
        saved, ctx.packed = apart(weight)
        weight = in_full(weight, inputs.dtype)
        lengths = lengths_with(weight, down, up, scale)
        ctx.save_for_backward(down, up, magnitude, lengths, saved, *kept)
        factor = _by_output(magnitude.reshape(-1) / lengths, window)
        hidden = product(inputs, down.to(inputs.dtype), window)
        change = product(hidden, scaled(up, scale).to(inputs.dtype), window and POINT)
        base = product(inputs, weight, window, bias)
        total = (factor - 1) * (base if bias is None else base - _by_output(bias, window))
        return total.add_(factor * change).add_(base).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs, down, up and magnitude."""
        down, up, magnitude, lengths, saved, *kept = ctx.saved_tensors
        inputs, scale, window = ctx.compute(*kept), ctx.scale, ctx.window
        weight = in_full(ctx.packed or saved, inputs.dtype)
        small_down, small_up = down.to(inputs.dtype), scaled(up, scale).to(inputs.dtype)
        hidden = product(inputs, small_down, window)
        direction = product(inputs, weight, window)
        add_product(direction, hidden, small_up, window and POINT)
        of_magnitude = (_sums_by_output(gradient, direction, window) / lengths).view(magnitude.shape)
        gradient = (gradient * _by_output(magnitude.reshape(-1) / lengths, window)).to(gradient.dtype)
        of_inputs = input_gradient(gradient, inputs, weight, window) if ctx.needs_input_grad[0] else None
        found = low_rank_gradients(gradient, inputs, hidden, small_down, small_up, window, of_inputs)
        of_down, of_up = found[0].to(down.dtype), scaled(found[1].to(up.dtype), scale)
        return of_inputs, of_down, of_up, of_magnitude, None, None, None, None, None


@torch.no_grad()
def lengths_with(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return |W + scale * up @ down| by output, (out,) float32 or wider, of a weight (out, in) or (out, in, kh, kw)."""
    down = down.flatten(1)
    pieces = []
    for rows in pieces_of(weight.shape[0], weight[0].numel()):
        change = (up[rows].flatten(1) @ down).view_as(weight[rows]) * scale
        pieces.append(lengths_of(change.add_(weight[rows])))
    return torch.cat(pieces)


def lengths_of(weight: Tensor) -> Tensor:
    """Return the norms over everything but the outputs, summed up as peft does: the quotient must be exactly 1."""
    dims = tuple(range(1, weight.dim()))
    lengths: Tensor = torch.linalg.norm(weight, dim=1) if len(dims) == 1 else weight.norm(p=2, dim=dims)
    return lengths


def pieces_of(num: int, width: int) -> Iterator[slice]:
    """Yield slices of `num` rows with `width` numbers each: few enough rows for a piece, and never one alone.

    They begin at multiples of 64 rows: bfloat16 products of a card are slow from an odd address on.
    """
    rows = ALIGNED * max(1, PIECE // width // ALIGNED)
    edges = [*range(0, max(1, num - 1), rows), num]
    yield from (slice(first, last) for first, last in pairwise(edges))


def _by_output(values: Tensor, window: Window | None) -> Tensor:
    return values if window is None else values.view(1, -1, 1, 1)


def _sums_by_output(one: Tensor, other: Tensor, window: Window | None) -> Tensor:
    """Sums of products by output, (out,), in float32 or wider."""
    wide = torch.promote_types(one.dtype, torch.float32)
    dims = tuple(range(one.dim() - 1)) if window is None else (0, 2, 3)
    return (one.to(wide) * other).sum(dims)
