"""Which noise levels a batch is trained at."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Generator, Tensor

from sdtrain.diffusion.words import Density


def draw_timesteps(
    num: int,
    generator: Generator,
    *,
    density: Density,
    first: int,
    last: int,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Draw timesteps, (num,) int64 in [first, last], on the CPU, so that they are the same on every device.

    logit_normal: t = sigmoid(mean + std n), scaled to the range (arXiv 2403.03206, section 3.1).
    """
    match density:
        case "uniform":
            share = torch.rand(num, generator=generator)
        case "logit_normal":
            share = torch.sigmoid(logit_mean + logit_std * torch.randn(num, generator=generator))
        case _:
            assert_never(density)
    return (first + (share * (last - first + 1)).long()).clamp_(max=last)


def stratified_timesteps(
    num: int,
    generator: Generator,
    *,
    density: Density,
    first: int,
    last: int,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Draw timesteps, (num,) int64 in [first, last], one out of each of `num` equally likely parts of the density.

    Their mean error is an unbiased estimate of that over the density, as it is with `draw_timesteps`, and varies less
    (stratified sampling). A uniform number of each part goes through the density's quantile function.
    """
    share = (torch.arange(num) + torch.rand(num, generator=generator, dtype=torch.float64)) / num
    match density:
        case "uniform":
            pass
        case "logit_normal":
            share = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(share))
        case _:
            assert_never(density)
    return (first + (share * (last - first + 1)).long()).clamp_(max=last)
