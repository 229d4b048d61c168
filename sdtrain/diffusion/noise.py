"""The noise that is added to latents."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional


def draw_noise(
    shape: tuple[int, int, int, int], generator: Generator, *, offset: float = 0.0, pyramid_discount: float = 0.0
) -> Tensor:
    """Draw noise of shape (n, c, h, w), float32, on the CPU, so that it is the same on every device.

    offset: adds offset times one normal number per channel, so that brightness is learnt too. pyramid_discount: adds
    coarser and coarser noise, scaled by the discount at each level, and scales the sum back to unit variance.
    """
    noise = torch.randn(shape, generator=generator)
    if pyramid_discount:
        noise = _pyramid(noise, generator, pyramid_discount)
    if offset:
        noise = noise + offset * torch.randn((*shape[:2], 1, 1), generator=generator)
    return noise


def _pyramid(noise: Tensor, generator: Generator, discount: float) -> Tensor:
    num, channels, height, width = noise.shape
    total, level = noise.clone(), 1
    while min(height, width) >> level >= 1:
        coarse = torch.randn((num, channels, height >> level, width >> level), generator=generator)
        total += discount**level * functional.interpolate(coarse, size=(height, width), mode="bilinear")
        level += 1
    return total / total.std(dim=(1, 2, 3), keepdim=True)


def perturb_input(noise: Tensor, generator: Generator, strength: float) -> Tensor:
    """Return the noise that the network sees while its target stays `noise`: noise + strength n, with normal n.

    Source: arXiv 2301.11706, eq. 9. All shapes are (n, c, h, w).
    """
    if not strength:
        return noise
    return noise + strength * torch.randn(noise.shape, generator=generator)
