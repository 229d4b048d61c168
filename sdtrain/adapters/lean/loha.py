"""LoHa beside a frozen layer: dW is the elementwise product of two low-rank matrices, and never whole in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdtrain.adapters.lean.dora import pieces_of
from sdtrain.adapters.lean.inputs import Remade, kept_of
from sdtrain.adapters.lean.lora import scaled
from sdtrain.adapters.lean.products import Window, add_product, input_gradient, weight_gradient


class Hadamard(torch.autograd.Function):
    """y = base + scale * ((w1_a @ w1_b) * (w2_a @ w2_b)) x (arXiv 2108.06098, prop. 2).

    Forward goes by blocks of outputs, backward by blocks of inputs: no sum over blocks is rounded in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        inputs: Tensor,
        w1_a: Tensor,
        w1_b: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        scale: float,
        shape: torch.Size,
        window: Window | None,
        how: Remade | None,
    ) -> Tensor:
        """Return y; base (..., out) or (n, out, h, w), shape: of the layer's weight."""
        ctx.scale, ctx.shape, ctx.window = scale, shape, window
        ctx.compute, kept = kept_of(inputs, how)
        ctx.save_for_backward(w1_a, w1_b, w2_a, w2_b, *kept)
        total, axis, w1_a = base.clone(), -1 if window is None else 1, scaled(w1_a, scale)
        for rows in pieces_of(shape[0], w1_b.shape[1]):
            change = _hadamard(w1_a[rows] @ w1_b, w2_a[rows] @ w2_b, inputs.dtype).view(-1, *shape[1:])
            add_product(total.narrow(axis, rows.start, rows.stop - rows.start), inputs, change, window)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of base, inputs and the four factors."""
        w1_a, w1_b, w2_a, w2_b, *kept = ctx.saved_tensors
        inputs, shape, window, wanted = ctx.compute(*kept), ctx.shape, ctx.window, ctx.needs_input_grad
        of_inputs = torch.empty_like(inputs) if wanted[1] else None
        found = [torch.zeros_like(factor) for factor in (w1_a, w1_b, w2_a, w2_b)]
        axis, area = (-1, 1) if window is None else (1, shape[2:].numel())
        scaled_w1_a = scaled(w1_a, ctx.scale)
        for channels in pieces_of(shape[1], shape[0] * area):
            columns = slice(channels.start * area, channels.stop * area)
            place = (axis, channels.start, channels.stop - channels.start)
            block, left, right = inputs.narrow(*place), scaled_w1_a @ w1_b[:, columns], w2_a @ w2_b[:, columns]
            change = _hadamard(left, right, inputs.dtype).view(shape[0], -1, *shape[2:])
            if of_inputs is not None:
                of_inputs.narrow(*place).copy_(input_gradient(gradient, block, change, window))
            of_change = weight_gradient(gradient, block, change, window).flatten(1)
            for other, a, b, of_a, of_b in ((right, scaled_w1_a, w1_b, *found[:2]), (left, w2_a, w2_b, *found[2:])):
                of_product = of_change * other
                of_a.addmm_(of_product, b[:, columns].T)
                of_b[:, columns] = a.T @ of_product
        found[0] = scaled(found[0], ctx.scale)
        return gradient if wanted[0] else None, of_inputs, *found, None, None, None, None


def _hadamard(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The elementwise product, computed in the type of its factors and rounded once to another."""
    return torch.mul(left, right, out=torch.empty_like(left, dtype=dtype))
