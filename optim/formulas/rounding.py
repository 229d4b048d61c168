"""Stochastic rounding of float32 to bfloat16, with bits that are a function of (seed, step, parameter, element).

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


def random_bits(keys: Tensor, offset: int, bits: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """16 random bits for each element of y, and 16 for each of z: the two halves of `lowbias32(key + GOLDEN * number)`.

    keys: int32 (n,), one per tensor. offset: number of the first element here in the whole tensor (not 0 in a shard).
    bits, spare: int32 (n, elements of each tensor here), overwritten and returned, with values below 2**16.
    """
    element = torch.arange(bits.shape[1], dtype=torch.int32, device=keys.device).mul_(signed(GOLDEN))
    torch.add(element, (keys + signed(GOLDEN * offset & 0xFFFFFFFF))[:, None], out=bits)
    for shift, multiplier in zip((16, 15), MULTIPLIERS, strict=True):
        bits.bitwise_xor_(_shifted(bits, shift, spare)).mul_(signed(multiplier))
    high = _shifted(bits, 16, spare)
    return bits.bitwise_xor_(high).bitwise_and_(0xFFFF), high


def _shifted(x: Tensor, shift: int, out: Tensor) -> Tensor:
    """x >> shift as if x were unsigned: torch's own shift of int32 fills up with the sign."""
    return torch.bitwise_right_shift(x, shift, out=out).bitwise_and_((1 << (32 - shift)) - 1)


def round_stochastic_(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds float32 `values` in place to a neighbouring bfloat16, up as often as they are near the upper one.

    bits: int32, random, below 2**16. Afterwards the lower 16 bits of the values are zero: a cast to bfloat16 is exact.
        A value that bfloat16 can hold stays as it is.
    """
    values.view(torch.int32).add_(bits).bitwise_and_(-65536)
    return values
