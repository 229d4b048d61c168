"""Products of float32 matrices: on the CPU by oneDNN where that is twice as fast, on a card in TF32 where it suffices.

On the CPU torch multiplies float32 matrices with MKL, which gives its AVX-512 kernels to processors of Intel only.
oneDNN, with which torch convolves, gives them to every processor that has them. Which of both it is depends on the
processor and on the sizes, never on a measurement: a run that goes on after a stop computes the same bits.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

WORTH_IT = 2**21
"""Multiplications from which on oneDNN is faster: a call of it costs 10 microseconds more than one of MKL."""
NARROW = 64
"""Narrower factors are left to MKL where oneDNN would need a copy: of a factor for the gradient of a weight, and of the
product to add it to something."""


@cache
def onednn_is_faster() -> bool:
    """Return whether this processor multiplies float32 matrices faster with oneDNN: AMD's, where it has AVX-512."""
    there: Any = torch.backends.mkl
    if not there.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor() -> str:
    """What the system says the processor is, its maker among it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:  # it is Linux's, and some sandboxes hide it
        return platform.processor()


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Let a card multiply the float32 matrices of the block in TF32, as it convolves by default.

    TF32 has the exponent of float32 and 10 bits of mantissa; sums are float32. The setting is PyTorch's, of the whole
    process, and is as it was afterwards.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Linear(nn.Linear):
    """torch's linear layer, its products by `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product with the inputs, (..., out)."""
        return linear(input, self.weight, self.bias)


LINEAR = (nn.Linear, Linear)
"""The classes of linear layers that compute a product, a bias, and nothing else."""


def multiply_fast(network: nn.Module) -> None:
    """Let the linear layers of a network compute with `linear`; their weights and names stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return inputs (..., in) times a weight (out, in), and a bias (out,): torch's function of this name."""
    if not _is_worth_it(inputs, weight, weight.shape[0]):
        return functional.linear(inputs, weight, bias)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (inputs, weight, bias)):
        function: Any = _Linear
        output = function.apply(inputs, weight, bias)
        assert isinstance(output, Tensor)
        return output
    return _by_onednn(inputs, weight, bias)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left (..., k) @ right (k, n), where nothing is kept for a backward."""
    return _by_onednn(left, right.T) if _is_worth_it(left, right, right.shape[1]) else left @ right


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add left (..., k) @ right (k, n) to `total` (..., n), in place, and return it; of 16 bits it is rounded once."""
    wide = left.shape[-1] >= NARROW and _is_worth_it(left, right, right.shape[1])
    if wide or not _has_rows(total):
        return total.add_(matmul(left, right))
    total.view(-1, total.shape[-1]).addmm_(_rows(left), right)
    return total


def weight_gradient(gradient: Tensor, inputs: Tensor) -> Tensor:
    """Return the gradient of a weight (out, in), from that of its product (..., out) and the inputs (..., in)."""
    gradient, inputs = _rows(gradient), _rows(inputs)
    if min(gradient.shape[1], inputs.shape[1]) < NARROW or not _is_worth_it(gradient, inputs, inputs.shape[1]):
        return gradient.T @ inputs
    return _by_onednn(gradient.T, inputs.T)


def _rows(activations: Tensor) -> Tensor:
    return activations.reshape(-1, activations.shape[-1])


def _has_rows(activations: Tensor) -> bool:
    """Whether a matrix of these, or of some of their columns, is the same memory."""
    sizes, strides = activations.shape, activations.stride()
    return strides[-1] == 1 and all(strides[at] == sizes[at + 1] * strides[at + 1] for at in range(len(sizes) - 2))


def _is_worth_it(left: Tensor, right: Tensor, columns: int) -> bool:
    """Whether oneDNN is to multiply: large float32 matrices that are nothing but numbers in the memory of the CPU.

    A compiler, autocast, and whoever traces tensors without numbers is to see torch's own functions.
    """
    if torch.compiler.is_compiling() or left.numel() * columns < WORTH_IT or not onednn_is_faster():
        return False
    for one in (left, right):
        if one.dtype != torch.float32 or one.device.type != "cpu" or type(one) not in (Tensor, nn.Parameter):
            return False
    return not torch.is_autocast_enabled("cpu")


def _by_onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    assert not torch.is_grad_enabled() or not (inputs.requires_grad or weight.requires_grad), "it has no backward"
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, "none", [], "")
    return output


class _Linear(torch.autograd.Function):
    """W x + bias. As with torch's own a frozen weight lets go of the inputs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product, (..., out)."""
        of_inputs, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if of_weight else None, weight if of_inputs else None)
        return _by_onednn(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs, the weight and the bias, where they are wanted."""
        inputs, weight = ctx.saved_tensors
        of_inputs = None if weight is None else matmul(gradient, weight)
        of_weight = None if inputs is None else weight_gradient(gradient, inputs)
        return of_inputs, of_weight, _rows(gradient).sum(0) if ctx.needs_input_grad[2] else None
