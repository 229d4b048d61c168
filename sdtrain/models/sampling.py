"""Pictures out of noise, on diffusers' Euler scheduler with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents (n, c, h, w) as the network wants them, timestep ()) -> guided prediction (n, c, h, w)."""


def initial_noise(shape: tuple[int, int, int], generators: Sequence[Generator]) -> Tensor:
    """(n, c, h, w) normal noise, one CPU generator a picture, so that a picture does not depend on its neighbours."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def sample_euler(
    denoise: Denoise, noise: Tensor, *, scheduler_config: dict[str, Any], num_inference_steps: int
) -> Tensor:
    """Latents (n, c, h, w) from unit noise by Euler steps (arXiv 2206.00364, algorithm 1 without churn)."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = denoise(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    assert isinstance(latents, Tensor)
    return latents


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6 with w = scale - 1)."""
    return unconditional + scale * (conditional - unconditional)
