"""Drawing pictures out of noise with diffusers' Euler scheduler and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from sdtrain.diffusion.guidance import rescaled_guidance
from sdtrain.models.model import Model, SamplingSettings

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Maps noisy latents (n, c, h, w), scaled for the network, and a timestep () to a guided prediction (n, c, h, w)."""


@torch.no_grad()
def sample(
    model: Model,
    positive: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    generators: Sequence[Generator],
    settings: SamplingSettings,
) -> Tensor:
    """Draw pictures (n, 3, h, w) in [-1, 1], on the CPU, for n prompts.

    Args:
        model: a model of any family.
        positive: the conditioning of the n prompts.
        negative: the conditioning that guidance moves away from, of n prompts as well.
        generators: one CPU generator per picture, so that a picture does not depend on its neighbours.
        settings: how to sample.
    """
    height, width = settings.height_px, settings.width_px
    sizes = model.encode_sizes(torch.tensor([[height, width, 0, 0, height, width]] * len(generators)).float())
    wanted, unwanted = {**positive, **sizes}, {**negative, **sizes}
    both = {key: torch.cat([unwanted[key], wanted[key]]) for key in wanted}

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        if settings.guidance_scale == 1:
            return model.predict(latents, timestep, wanted).float()
        output = model.predict(torch.cat([latents, latents]), timestep, both).float()
        unconditional, conditional = output.chunk(2)
        prediction = guided(conditional, unconditional, settings.guidance_scale)
        if settings.guidance_rescale == 0:
            return prediction
        return rescaled_guidance(prediction, conditional, settings.guidance_rescale)

    channels, factor = model.latent_shape
    noise = initial_noise((channels, height // factor, width // factor), generators).to(model.device)
    latents = sample_euler(
        denoise, noise, scheduler_config=model.scheduler_config, num_inference_steps=settings.num_inference_steps
    )
    return model.decode_latents(latents)


def initial_noise(shape: tuple[int, int, int], generators: Sequence[Generator]) -> Tensor:
    """Draw normal noise (n, c, h, w), each picture of shape (c, h, w) from its own CPU generator.

    So a picture does not depend on its neighbours.
    """
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def sample_euler(
    denoise: Denoise, noise: Tensor, *, scheduler_config: Mapping[str, Any], num_inference_steps: int
) -> Tensor:
    """Return latents (n, c, h, w) made from unit noise of that shape by Euler steps.

    Source: arXiv 2206.00364, algorithm 1 without churn.
    """
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_config(dict(scheduler_config))
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = denoise(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    assert isinstance(latents, Tensor)
    return latents


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return the guided prediction (n, c, h, w): unconditional + scale (conditional - unconditional).

    This is classifier-free guidance, arXiv 2207.12598, eq. 6 with w = scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)
