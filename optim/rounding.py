"""Stochastic rounding of float32 to bfloat16, with bits that depend on (seed, step, parameter, element) and on nothing
else.

A counter-based hash takes the place of a generator: there is no state to save beyond the seed and the step count, every
rank of a run and every shard of a tensor draws the same bits, and the global generators are never touched.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9
"""2**32 / golden ratio: spreads neighbouring element numbers over all 32 bits."""

MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
"""The multipliers of the 32-bit finaliser `lowbias32` (C. Wellons, "Prospecting for hash functions", 2018)."""


def mix(value: int) -> int:
    """A 32-bit hash of a whole number, on the host."""
    value &= 0xFFFFFFFFFFFFFFFF
    x = (value ^ (value >> 32)) & 0xFFFFFFFF
    x ^= x >> 16
    x = x * MULTIPLIERS[0] & 0xFFFFFFFF
    x ^= x >> 15
    x = x * MULTIPLIERS[1] & 0xFFFFFFFF
    return x ^ (x >> 16)


def parameter_key(seed: int, index: int) -> int:
    """The 32-bit key of the parameter that stands at `index` among all parameters."""
    return mix(mix(seed) + GOLDEN * (index + 1))


def step_key(seed: int, step: int) -> int:
    """The 32-bit key of a step; a parameter's key is xored with it."""
    return mix(mix(seed ^ 0x5DEECE66D) + GOLDEN * (step + 1))


def signed(value: int) -> int:
    """The same 32 bits as the signed whole number that torch.int32 holds."""
    return value - (1 << 32) if value >= 1 << 31 else value


def random_bits(keys: Tensor, num: int, offset: int) -> Tensor:
    """32 random bits for each element: `lowbias32(key + GOLDEN * element number)`.

    keys: int32 [N], one a tensor. num: elements of each tensor here. offset: number of the first of them in the whole
        tensor
    (not 0 in a shard). Returns int32 [N, num]: the low 16 bits are for y, the high 16 for z.
    """
    element = torch.arange(num, dtype=torch.int32, device=keys.device)
    x = element.mul_(signed(GOLDEN)) + (keys + signed(GOLDEN * offset & 0xFFFFFFFF))[:, None]
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(signed(MULTIPLIERS[0]))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(signed(MULTIPLIERS[1]))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def round_stochastic(values: Tensor, bits: Tensor) -> Tensor:
    """float32 `values` rounded to a neighbouring bfloat16, up with the probability of the distance from the lower one.

    bits: int32, 16 random bits in the low half. Returns float32 whose lower 16 bits are zero: a cast to bfloat16 is
        exact.
    A value that bfloat16 can hold stays as it is.
    """
    return (values.view(torch.int32) + bits.bitwise_and(0xFFFF)).bitwise_and_(-65536).view(torch.float32)
