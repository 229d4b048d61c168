"""Drawing pictures out of noise with schedulers of diffusers and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, assert_never

import torch
from torch import Generator, Tensor

from sdtrain.diffusion.guidance import rescaled_guidance
from sdtrain.diffusion.words import Sampler
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
    between: Callable[[], None] = lambda: None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Draw pictures (n, 3, h, w) in [-1, 1], on the CPU, for n prompts.

    Args:
        model: a model of any family.
        positive: the conditioning of the n prompts.
        negative: the conditioning that guidance moves away from, of n prompts as well.
        generators: one CPU generator per picture, so that a picture does not depend on its neighbours.
        settings: how to sample.
        between: called before every step and every picture that is decoded; to give up the pictures, it raises.
        autocast: the block in which the network predicts; the VAE, which would overflow, stays out of it.
    """
    height, width = settings.height_px, settings.width_px
    sizes = model.encode_sizes(torch.tensor([[height, width, 0, 0, height, width]] * len(generators)).float())
    wanted, unwanted = {**positive, **sizes}, {**negative, **sizes}
    both = {key: torch.cat([unwanted[key], wanted[key]]) for key in wanted}

    def predict(latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        with autocast():
            return model.predict(latents, timestep, conditioning).float()

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        between()
        if settings.guidance_scale == 1:
            return predict(latents, timestep, wanted)
        output = predict(torch.cat([latents, latents]), timestep, both)
        unconditional, conditional = output.chunk(2)
        prediction = guided(conditional, unconditional, settings.guidance_scale)
        if settings.guidance_rescale == 0:
            return prediction
        return rescaled_guidance(prediction, conditional, settings.guidance_rescale)

    channels, factor = model.latent_shape
    noise = initial_noise((channels, height // factor, width // factor), generators).to(model.device)
    scheduler = scheduler_of(settings.sampler, model.scheduler_config)
    latents = sample_latents(denoise, noise, scheduler, settings.num_inference_steps, generators)
    pictures = []
    for one in latents:
        between()
        pictures.append(model.decode_latents(one[None]))
    return torch.cat(pictures)


def initial_noise(shape: tuple[int, int, int], generators: Sequence[Generator]) -> Tensor:
    """Draw normal noise (n, c, h, w), each picture of shape (c, h, w) from its own CPU generator.

    So a picture does not depend on its neighbours.
    """
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def scheduler_of(sampler: Sampler, config: Mapping[str, Any]) -> Any:
    """Return a scheduler of diffusers for a model whose noise schedule has this configuration.

    Sources: `euler` is arXiv 2206.00364, algorithm 1 without churn, with its times in equal steps, `euler_a` the same
    with noise put back at every step; `dpmpp_2m_karras` is DPM-Solver++(2M), arXiv 2211.01095, at the noise levels of
    arXiv 2206.00364, eq. 5; `unipc` is UniPC, arXiv 2302.04867.
    """
    import diffusers

    plain = dict(config)
    match sampler:
        case "euler":
            return diffusers.EulerDiscreteScheduler.from_config(plain)
        case "euler_a":
            return diffusers.EulerAncestralDiscreteScheduler.from_config(plain)
        case "dpmpp_2m_karras":
            return diffusers.DPMSolverMultistepScheduler.from_config(plain, use_karras_sigmas=True)
        case "unipc":
            return diffusers.UniPCMultistepScheduler.from_config(plain)
        case _:
            assert_never(sampler)


def sample_latents(
    denoise: Denoise, noise: Tensor, scheduler: Any, num_inference_steps: int, generators: Sequence[Generator]
) -> Tensor:
    """Return latents (n, c, h, w) made from unit noise of that shape by the steps of a scheduler.

    generators: one for each picture, of which samplers that add noise draw on.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    extra = {"generator": list(generators)} if "generator" in signature(scheduler.step).parameters else {}
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = denoise(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
    assert isinstance(latents, Tensor)
    return latents


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return the guided prediction (n, c, h, w): unconditional + scale (conditional - unconditional).

    This is classifier-free guidance, arXiv 2207.12598, eq. 6 with w = scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)
