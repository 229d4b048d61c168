"""LoRA beside a frozen layer: y = base + scale * up(down(x))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdtrain.adapters.lean.inputs import Remade, kept_of
from sdtrain.adapters.lean.products import POINT, Window, input_gradient, plus_product, product, weight_gradient


class LowRank(torch.autograd.Function):
    """A LoRA added to what its layer gives (arXiv 2106.09685, eq. 3); what is inside is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        inputs: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        window: Window | None,
        how: Remade | None,
    ) -> Tensor:
        """Return base + scale * up(down(inputs)).

        base: what the frozen layer gives, (..., out) or (n, out, h, w). window: of `down`, None for linear layers.
        how: the inputs are made, where it is known.
        """
        ctx.scale, ctx.window = scale, window
        ctx.compute, kept = kept_of(inputs, how)
        ctx.save_for_backward(down, up, *kept)
        hidden = product(inputs, down.to(inputs.dtype), window)
        return plus_product(base, hidden, (up * scale).to(inputs.dtype), window and POINT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of base, inputs, down and up."""
        down, up, *kept = ctx.saved_tensors
        inputs, wanted = ctx.compute(*kept), ctx.needs_input_grad
        hidden = product(inputs, down.to(inputs.dtype), ctx.window)
        found = low_rank_gradients(gradient, inputs, hidden, down, up, ctx.scale, ctx.window, inputs_too=wanted[1])
        return gradient if wanted[0] else None, *found, None, None, None


def low_rank_gradients(
    gradient: Tensor,
    inputs: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    window: Window | None,
    *,
    inputs_too: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of inputs, down and up, from that of scale * up(hidden), hidden = down(inputs)."""
    point = window and POINT
    of_up = weight_gradient(gradient, hidden, up, point).mul_(scale)
    of_hidden = input_gradient(gradient, hidden, (up * scale).to(inputs.dtype), point)
    of_down = weight_gradient(of_hidden, inputs, down, window)
    of_inputs = input_gradient(of_hidden, inputs, down.to(inputs.dtype), window) if inputs_too else None
    return of_inputs, of_down, of_up
