"""Weights in eight or four bits: packed once by their package, and unpacked for each product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

Packing = Literal["int8", "fp8", "nf4"]
SMALLEST = 1e-12
"""What the largest weight of an output counts as at least in fp8: torchao would divide by zero."""
BLOCK = 64
"""The number of neighbours that share one scale in nf4, as arXiv 2305.14314 has it."""


@dataclass(frozen=True)
class Packed:
    """A weight (out, in) in few bits.

    int8, fp8: values (out, in), times scales (out, 1) float32, one an output. nf4: values (n, 1) hold two numbers a
    byte, each the place in a table of 16 quantiles; scales (blocks,) float32.
    """

    packing: Packing
    shape: torch.Size
    values: Tensor
    scales: Tensor

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), rounded once to `dtype`: it is made anew, and nobody keeps it."""
        match self.packing:
            case "int8" | "fp8":
                return self.values.to(dtype).mul_(self.scales)
            case "nf4":
                known = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
                operation = torch.ops.bitsandbytes.dequantize_4bit
                flat = [self.shape.numel()]  # of rows that end within a block its CPU kernel takes the wrong scales
                unpacked: Tensor = operation(self.values, self.scales, BLOCK, "nf4", flat, known)
                return unpacked.view(self.shape).to(dtype)
            case _:
                assert_never(self.packing)


def packed(weight: Tensor, packing: Packing) -> Packed:
    """Return a weight (out, in) in few bits, on its device."""
    wide = weight.detach().float()
    match packing:
        case "int8":
            from torchao.quantization import Int8Tensor, PerRow

            found = Int8Tensor.from_hp(wide, PerRow())
            values, scales = found.qdata, found.scale
        case "fp8":
            from torchao.quantization import Float8Tensor, PerRow

            found = Float8Tensor.from_hp(wide, granularity=PerRow(), hp_value_lb=SMALLEST)
            values, scales = found.qdata, found.scale
        case "nf4":
            from bitsandbytes.functional import quantize_4bit

            values, state = quantize_4bit(wide, blocksize=BLOCK, quant_type="nf4")
            scales = state.absmax
        case _:
            assert_never(packing)
    return Packed(packing, weight.shape, values, scales)


def packed_shapes(weight: Tensor, packing: Packing) -> Packed:
    """Return what `packed` does without its numbers: for a plan, on tensors that have none."""
    out, inputs = weight.shape
    match packing:
        case "int8" | "fp8":
            values = torch.empty(out, inputs, dtype=torch.int8 if packing == "int8" else torch.float8_e4m3fn)
            scales = torch.empty(out, 1)
        case "nf4":
            import bitsandbytes  # noqa: F401 - it makes its operations known to torch

            values = torch.empty(math.ceil(out * inputs / 2), 1, dtype=torch.uint8)
            scales = torch.empty(math.ceil(out * inputs / BLOCK))
        case _:
            assert_never(packing)
    return Packed(packing, weight.shape, values, scales)


def packed_bytes(shape: torch.Size, packing: Packing) -> int:
    """Return the bytes of a weight (out, in) once it is packed: of its numbers and of their scales in float32."""
    match packing:
        case "int8" | "fp8":
            return shape.numel() + 4 * shape[0]
        case "nf4":
            return math.ceil(shape.numel() / 2) + 4 * math.ceil(shape.numel() / BLOCK)
        case _:
            assert_never(packing)


def in_full(weight: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """Return a weight to compute with: itself, or unpacked into `dtype`."""
    return weight if isinstance(weight, Tensor) else weight.unpacked(dtype)


def apart(weight: Tensor | Packed) -> tuple[Tensor | None, Packed | None]:
    """Return what autograd saves of a weight for backward, and what needs no saving, for no step changes it."""
    return (weight, None) if isinstance(weight, Tensor) else (None, weight)
