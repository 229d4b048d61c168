"""LoRA on a frozen layer: y = W x + bias + scale * up(down(x))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdtrain.adapters.lean.inputs import Remade, kept_of
from sdtrain.adapters.lean.products import (
    POINT,
    Window,
    add_input_gradient,
    add_product,
    input_gradient,
    product,
    weight_gradient,
)
from sdtrain.adapters.quantised.packing import Packed, apart, in_full


class LowRank(torch.autograd.Function):
    """A frozen layer and its LoRA in one (arXiv 2106.09685, eq. 3): sums are written into what is there already.

    What is kept besides the inputs is small: what is inside, of `rank` channels, and both matrices in the type of the
    activations. Computing them again cost a card less than it cost the processor that feeds it: hundreds of layers of
    a few microseconds each. The weight is nobody's to train: it gets no gradient. A packed one is
    unpacked for each product, and not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        down: Tensor,
        up: Tensor,
        weight: Tensor | Packed,
        bias: Tensor | None,
        scale: float,
        window: Window | None,
        how: Remade | None,
    ) -> Tensor:
        """Return W inputs + bias + scale * up(down(inputs)), (..., out) or (n, out, h, w).

        window: of the weight and of `down`, None for linear layers. how: the inputs are made, where it is known.
        """
        ctx.scale, ctx.window = scale, window
        ctx.compute, kept = kept_of(inputs, how)
        small_down, small_up = down.to(inputs.dtype), scaled(up, scale).to(inputs.dtype)
        hidden = product(inputs, small_down, window)
        ctx.types = down.dtype, up.dtype
        saved, ctx.packed = apart(weight)
        ctx.save_for_backward(small_down, small_up, hidden, saved, *kept)
        base = product(inputs, in_full(weight, inputs.dtype), window, bias)
        return add_product(base, hidden, small_up, window and POINT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs, down and up."""
        small_down, small_up, hidden, saved, *kept = ctx.saved_tensors
        inputs, window, (of_down, of_up) = ctx.compute(*kept), ctx.window, ctx.types
        of_inputs = None
        if ctx.needs_input_grad[0]:
            weight = in_full(ctx.packed or saved, inputs.dtype)
            of_inputs = input_gradient(gradient, inputs, weight, window)
            del weight
        found = low_rank_gradients(gradient, inputs, hidden, small_down, small_up, window, of_inputs)
        return of_inputs, found[0].to(of_down), scaled(found[1].to(of_up), ctx.scale), None, None, None, None, None


def low_rank_gradients(
    gradient: Tensor,
    inputs: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    window: Window | None,
    of_inputs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of down and up, from that of up(hidden), hidden = down(inputs); all in one type.

    The gradient of the inputs is added to `of_inputs`, where it is wanted.
    """
    point = window and POINT
    of_up = weight_gradient(gradient, hidden, up, point)
    of_hidden = input_gradient(gradient, hidden, up, point)
    if of_inputs is not None:
        add_input_gradient(of_inputs, of_hidden, inputs, down, window)
    return weight_gradient(of_hidden, inputs, down, window), of_up


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """Return a tensor times a scale; the tensor itself where that is 1, which alpha = rank makes it."""
    return tensor if scale == 1 else tensor * scale
