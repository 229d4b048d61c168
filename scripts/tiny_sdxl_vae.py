"""Trains the autoencoder of the built-in tiny SDXL: factor 8, four channels, edges kept.

It starts as a plain downscaler (see `start_as_downscaler`) and both halves then learn together. What keeps its latents
a good place for a diffusion model is noise on them while it trains, so that near latents mean near pictures. The noise
is a share of what the latents deviate by, so that the encoder cannot simply shout above it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import picture_world as world
import tiny_sdxl_parts as parts
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

SIZE_PX = 128
NUM_PICTURES = 4000
CROPS = ((64, 8), (96, 4), (128, 2))
"""Side in px and number of the crops of a step: nearly the same work, and figures of every share of the picture."""
NOISE = 0.15  # largest deviation of the noise on latents, as a share of their own
SMOOTH = 0.05  # error in -1..1 below which the loss is that of least squares
LATENT_STD = 0.6  # of each channel, before `scaling_factor`


def train_vae(state_path: Path, steps: int, peak: float) -> None:
    """Trains up to `steps` steps, going on from the state at `state_path`; at the end it is folded and measured."""
    pool = to_bytes([any_picture(np.random.default_rng([1, i])) for i in range(NUM_PICTURES)])
    torch.manual_seed(1)  # for the initial weights
    model = parts.make_vae().to(memory_format=torch.channels_last)
    parts.start_as_downscaler(model)
    parts.hold_constants(model)
    optimizer = torch.optim.AdamW(scaled_groups(model), weight_decay=0.0, betas=(0.9, 0.99))
    first = 0
    if (saved := parts.read_state(state_path)) is not None:
        if saved["folded"]:
            print(f"{state_path} is finished")
            return
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    began, errors = time.monotonic(), []
    for step in range(first, steps):
        loss, error = vae_loss(model, pool, step)
        parts.update(optimizer, loss, parts.learning_rate(step, steps, peak))
        errors.append(error)
        if step % 50 == 49:
            parts.report("vae", step + 1, steps, errors, began)
        if step % 250 == 249 and step + 1 < steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            parts.write_state(state_path, {**state, "step": step + 1, "folded": False})
    scaling_factor = fold(model, pool[:200])
    state = {"model": model.state_dict(), "scaling_factor": scaling_factor}
    parts.write_state(state_path, {**state, "step": steps, "folded": True})
    print(f"mean error in -1..1: {reconstruction_error(model):.4f}, scaling factor {scaling_factor:.4f}")


def scaled_groups(model: AutoencoderKL) -> list[dict[str, Any]]:
    """A group for every parameter, so that each may move its layer's output by about as much in a step.

    Adam moves every weight by the learning rate, so a layer that sums over hundreds of inputs would move by hundreds
    of learning rates. The norms here scale by a fixed amount and do not take that away again.
    """
    return [
        {"params": [parameter], "scale": 1 / parameter[0].numel() if parameter.ndim == 4 else 0.02}
        for parameter in model.parameters()
    ]


def any_picture(rng: np.random.Generator) -> Image.Image:
    """A picture of the world with the concept and all finishes, or polygons of any form in any two colours."""
    size = (SIZE_PX, SIZE_PX)
    if rng.random() < 0.75:
        return world.draw(world.random_scene(rng, size, (*world.SHAPES, world.CONCEPT_SHAPE), world.FINISHES))
    num = int(rng.integers(3, 12))
    angles = np.sort(rng.uniform(0, 2 * math.pi, num))
    reach = rng.uniform(15, 60, (num, 1))
    corners = reach * np.stack([np.cos(angles), np.sin(angles)], 1) + rng.uniform(40, 88, 2)
    named = [*world.COLOURS.values(), *world.BACKGROUNDS.values()]
    colours = [named[rng.integers(len(named))] if rng.random() < 0.6 else rng.integers(0, 256, 3) for _ in range(2)]
    colour, ground = (tuple(int(channel) for channel in each) for each in colours)
    return world.draw_polygon(corners, colour, ground, size)


def to_bytes(pictures: list[Image.Image]) -> Tensor:
    """Pictures of one size as uint8 (n, 3, h, w)."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 -> float in -1..1."""
    return (pictures.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def vae_loss(model: AutoencoderKL, pool: Tensor, step: int) -> tuple[Tensor, float]:
    """The loss () of a step's crops, drawn by the step's number, and their mean error in -1..1."""
    rng, generator = np.random.default_rng([2, step]), torch.Generator().manual_seed(step)
    side, num = CROPS[rng.integers(len(CROPS))]
    chosen = rng.integers(0, len(pool), num)
    places = rng.integers(0, SIZE_PX - side + 1, (num, 2))
    crops = [pool[i, :, y : y + side, x : x + side] for i, (y, x) in zip(chosen, places, strict=True)]
    pixels = to_pixels(torch.stack(crops))
    latents = model.encode(pixels).latent_dist.mean
    strength = NOISE * latents.detach().std() * torch.rand(num, 1, 1, 1, generator=generator)
    rebuilt = model.decode(latents + strength * torch.randn(latents.shape, generator=generator)).sample
    error = rebuilt - pixels
    # The absolute error, but smooth below SMOOTH: its steady pull would keep tinting plain areas.
    return ((error.square() + SMOOTH**2).sqrt() - SMOOTH).mean(), error.abs().mean().item()


@torch.no_grad()
def fold(model: AutoencoderKL, pictures: Tensor) -> float:
    """Moves each latent channel to mean 0 and deviation LATENT_STD, and returns the scaling factor that is then right.

    The 1 x 1 convolutions beside the latents take the change up, so the pictures stay what they were, except for
    rounding. pictures: uint8 (n, 3, h, w).
    """
    latents = encode(model, pictures)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    out, back = model.quant_conv, model.post_quant_conv
    back.bias.add_(back.weight[:, :, 0, 0] @ mean)
    back.weight.mul_((std / LATENT_STD)[None, :, None, None])
    out.bias[:4] = (out.bias[:4] - mean) / std * LATENT_STD
    out.weight[:4] *= (LATENT_STD / std)[:, None, None, None]
    return 1 / float(encode(model, pictures).std())


def encode(model: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Unscaled latents (n, 4, h / 8, w / 8) of uint8 pictures (n, 3, h, w)."""
    return torch.cat([model.encode(to_pixels(part)).latent_dist.mode() for part in pictures.split(20)])


@torch.no_grad()
def reconstruction_error(model: AutoencoderKL, num: int = 60) -> float:
    """Mean absolute error, with pixels in -1..1, over pictures of the plain world that training did not see."""
    rng = np.random.default_rng(9)
    shapes = (*world.SHAPES, world.CONCEPT_SHAPE)
    pictures = to_bytes([world.draw(world.random_scene(rng, (SIZE_PX, SIZE_PX), shapes)) for _ in range(num)])
    rebuilt = torch.cat([model.decode(part).sample for part in encode(model, pictures).split(10)])
    return F.l1_loss(rebuilt.clamp(-1, 1), to_pixels(pictures)).item()
