"""A product of activations and a weight, linear or convolution, and its gradients: the one step all adapters take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sdtrain.adapters.lean.inputs import Remade, kept_of
from sdtrain.matmul import add_matmul, linear, matmul
from sdtrain.matmul import weight_gradient as linear_weight_gradient


@dataclass(frozen=True)
class Window:
    """How a convolution moves over the pixels; its padding is zeros, its channels are in one group."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)


POINT = Window()
"""A convolution that looks at one pixel."""


def product(inputs: Tensor, weight: Tensor, window: Window | None, bias: Tensor | None = None) -> Tensor:
    """Return inputs (..., in) times a weight (out, in), or convolved: (n, in, h, w) and (out, in, kh, kw)."""
    if window is None:
        return linear(inputs, weight, bias)
    return functional.conv2d(inputs, weight, bias, window.stride, window.padding, window.dilation)


def add_product(total: Tensor, inputs: Tensor, weight: Tensor, window: Window | None) -> Tensor:
    """Add product(inputs, weight) to `total`, in place, and return it; of a linear layer rounded once."""
    if window is None:
        return add_matmul(total, inputs, weight.T)
    return total.add_(product(inputs, weight, window))


def input_gradient(gradient: Tensor, inputs: Tensor, weight: Tensor, window: Window | None) -> Tensor:
    """Return the gradient of the inputs, from that of the product. Of `inputs` only the shape is used."""
    if window is None:
        return matmul(gradient, weight)
    return _convolution_gradients(gradient, inputs, weight, window, inputs_too=True)[0]


def add_input_gradient(total: Tensor, gradient: Tensor, inputs: Tensor, weight: Tensor, window: Window | None) -> None:
    """Add the gradient of the inputs to `total`, in place; of a linear layer rounded once."""
    if window is None:
        add_matmul(total, gradient, weight)
    else:
        total.add_(input_gradient(gradient, inputs, weight, window))


def weight_gradient(gradient: Tensor, inputs: Tensor, weight: Tensor, window: Window | None) -> Tensor:
    """Return the gradient of the weight, in the type of `weight`; the products are in that of the activations."""
    if window is None:
        return linear_weight_gradient(gradient, inputs).to(weight.dtype)
    small = weight.to(inputs.dtype)
    return _convolution_gradients(gradient, inputs, small, window, inputs_too=False)[1].to(weight.dtype)


def _convolution_gradients(
    gradient: Tensor, inputs: Tensor, weight: Tensor, window: Window, *, inputs_too: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of the inputs or that of the weight; the other place holds None."""
    mask = (inputs_too, not inputs_too, False)
    found = torch.ops.aten.convolution_backward.default(
        gradient, inputs, weight, None, window.stride, window.padding, window.dilation, False, (0, 0), 1, mask
    )
    return found[0], found[1]


class Product(torch.autograd.Function):
    """A product with a float32 weight in the type of the activations, which are kept as they are."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, window: Window | None, remade: Remade | None) -> Tensor:
        """Return product(inputs, weight) in the inputs' type."""
        ctx.window = window
        ctx.compute, kept = kept_of(inputs, remade)
        ctx.save_for_backward(weight, *kept)
        return product(inputs, weight.to(inputs.dtype), window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs and of the weight."""
        weight, *kept = ctx.saved_tensors
        inputs = ctx.compute(*kept)
        wanted, window = ctx.needs_input_grad, ctx.window
        of_inputs = input_gradient(gradient, inputs, weight.to(inputs.dtype), window) if wanted[0] else None
        of_weight = weight_gradient(gradient, inputs, weight, window) if wanted[1] else None
        return of_inputs, of_weight, None, None
