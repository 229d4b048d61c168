"""LoKr beside a frozen layer: dW is a Kronecker product, applied factor by factor to the inputs in a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdtrain.adapters.lean.inputs import Remade, kept_of
from sdtrain.adapters.lean.products import Window, input_gradient, product, weight_gradient


class Kronecker(torch.autograd.Function):
    """y = base + kron(w1, w2) x (arXiv 2309.14859, eq. 6).

    With the inputs as a grid X (in1, in2), kron(w1, w2) x is w1 X w2^T: w2 is a small layer over every row of the grid.
    """

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, inputs: Tensor, w1: Tensor, w2: Tensor, window: Window | None, how: Remade | None
    ) -> Tensor:
        """Return y; base (..., out1 * out2) or (n, out1 * out2, h, w), w1 (out1, in1), w2 (out2, in2[, kh, kw])."""
        ctx.window = window
        ctx.compute, kept = kept_of(inputs, how)
        ctx.save_for_backward(w1, w2, *kept)
        rows = product(_grid(inputs, w1, w2), w2.to(inputs.dtype), window)
        change = w1.to(inputs.dtype) @ _flat(rows, w1.shape[1], window)
        return base + change.reshape(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of base, inputs, w1 and w2."""
        w1, w2, *kept = ctx.saved_tensors
        inputs, window, wanted = ctx.compute(*kept), ctx.window, ctx.needs_input_grad
        grid, small_w2 = _grid(inputs, w1, w2), w2.to(inputs.dtype)
        rows = product(grid, small_w2, window)
        flat = _flat(rows, w1.shape[1], window)
        of_change = gradient.reshape(flat.shape[0], w1.shape[0], flat.shape[2])
        of_w1 = torch.tensordot(of_change, flat, dims=([0, 2], [0, 2])).to(w1.dtype)
        of_rows = (w1.T.to(inputs.dtype) @ of_change).reshape(rows.shape)
        of_w2 = weight_gradient(of_rows, grid, w2, window)
        of_inputs = input_gradient(of_rows, grid, small_w2, window).view(inputs.shape) if wanted[1] else None
        return gradient if wanted[0] else None, of_inputs, of_w1, of_w2, None, None


def _grid(inputs: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """(..., in1 * in2) as (n, in1, in2), or pixels (n, in1 * in2, h, w) as (n * in1, in2, h, w)."""
    if w2.dim() == 2:
        return inputs.reshape(-1, w1.shape[1], w2.shape[1])
    return inputs.reshape(-1, w2.shape[1], *inputs.shape[2:])


def _flat(rows: Tensor, in1: int, window: Window | None) -> Tensor:
    """What w2 gives, as (n, in1, everything that w1 does not mix)."""
    return rows if window is None else rows.reshape(-1, in1, rows[0].numel())
