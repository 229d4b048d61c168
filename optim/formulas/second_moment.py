"""The second moment of the gradient, full or factored, and the updates that are made of it.

Sources: Adafactor arXiv 1804.04235 (algorithm 4), Adam-atan2 arXiv 2407.05872 (section 3.3), StableAdamW arXiv
2304.13013 (algorithm 2).
"""

import math

import torch
from torch import Tensor

MIN_DIM_TO_FACTOR = 32
FOUR_OVER_PI = 4 / math.pi
TINY = 1.1754943508222875e-38
"""The smallest normal float32: as the smallest divisor it turns 0 / 0 into 0 and changes no other quotient."""
ATAN_POLYNOMIAL = (
    *(-0.005162435118108988, 0.02783678099513054, -0.07118978351354599, 0.12276826798915863),
    *(-0.17709016799926758, 0.2539675533771515, -0.4243689775466919, 1.2732386589050293),
)
"""(4/pi) atan(r) / r as a minimax polynomial of r^2 on [0, 1], highest power first: within 2.1e-7 of the true value.
The compiled steps use it; plain torch has an atan of its own."""
SMALLEST_ROOT = 2e-19
"""Smallest root of a factor of the second moment: the product of two is just a normal float32, so that 0 / 0 gives 0.
Smaller roots come from nothing but squares that underflowed."""


def factored_axes(shape: torch.Size) -> tuple[int, int] | None:
    """The two largest axes, in the order they stand in, over which the second moment of this shape is factored.

    None if the tensor has fewer than two axes or all of them are shorter than 32, where factors would save next to
    nothing, or if it is empty.
    """
    if len(shape) < 2 or max(shape) < MIN_DIM_TO_FACTOR or shape.numel() == 0:
        return None
    by_size = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
    first, second = sorted(by_size[-2:])
    return first, second


def factor_roots(row: Tensor, col: Tensor, col_axis: int, d: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(v) / d = a b with a = sqrt(R / mean(R)) and b = sqrt(C) / d (Adafactor, eq. 4).

    row: R, the mean of g^2 over `col_axis` (size 1 there). col: C, the mean over the other factored axis. d: 0-dim.
    mean(R) equals the mean of C over `col_axis`, for both are the mean of all squares; the latter is taken because
    under sharding every rank holds all of C. The roots are taken of the factors and not of their product: fewer roots,
    and the product of small factors cannot underflow. d is divided by here, where there is little to divide, and not in
    every element of the gradient.
    """
    a = (row / col.mean(dim=col_axis, keepdim=True).clamp_min(TINY)).sqrt_()
    return a.clamp_min_(SMALLEST_ROOT), col.sqrt().div_(d).clamp_min_(SMALLEST_ROOT)


def atan2_update(direction: Tensor, root: Tensor) -> Tensor:
    """u pi/4 = atan2(d g, sqrt v) = atan(g / (sqrt(v) / d)), written over the root: at most pi/2, without an epsilon.

    direction: g. root: sqrt(v) / d, > 0. torch's atan2 takes three times as long as its atan.
    """
    return torch.div(direction, root, out=root).atan_()


def epsilon_update(direction: Tensor, root: Tensor, eps: float) -> Tensor:
    """u = d g / (sqrt v + d eps), Adam's update in Prodigy's scaling, written over the root.

    direction: g. root: sqrt(v) / d.
    """
    return torch.div(direction, root.add_(eps), out=root)


def rms_divisor(sum_of_squares: Tensor, count: int) -> Tensor:
    """What StableAdamW divides u by, sqrt(max(1, rms(u))): one value per tensor, from its sum of squares."""
    return (sum_of_squares / count).sqrt_().clamp_min_(1.0).sqrt_()
