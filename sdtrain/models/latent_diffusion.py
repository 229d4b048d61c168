"""What all families share: a VAE around the latents, a noise schedule, guided sampling; plain functions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Generator, Tensor, nn

from sdtrain.config.schema import ModelConfig
from sdtrain.diffusion.schedule import NoiseSchedule, betas_of, schedule_of_betas
from sdtrain.diffusion.words import Prediction
from sdtrain.families.modelspec import Description
from sdtrain.models.checkpoints.components import Components, SDComponents
from sdtrain.models.checkpoints.folder import write_folder
from sdtrain.models.checkpoints.single_file import Change, write_single_file
from sdtrain.models.model import Layout, SamplingSettings
from sdtrain.models.prompts import Tokenizer
from sdtrain.models.sampling import guided, initial_noise, sample_euler

Predict = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(noisy latents (n, c, h, w), timestep (), conditioning of n) -> the U-Net's output (n, c, h, w)."""


def resolved_scheduler(scheduler: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The scheduler's configuration with what the user decided instead of `auto`."""
    resolved = dict(scheduler)
    if config.prediction != "auto":
        resolved["prediction_type"] = config.prediction
    if config.zero_terminal_snr != "auto":
        resolved["rescale_betas_zero_snr"] = config.zero_terminal_snr == "on"
    return resolved


def prediction_of(scheduler: Mapping[str, Any]) -> Prediction:
    """What the U-Net predicts, by its scheduler's configuration."""
    return "v_prediction" if scheduler.get("prediction_type") == "v_prediction" else "epsilon"


def schedule_of(scheduler: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a scheduler's configuration. Raises ValueError for betas that are not known."""
    betas = betas_of(
        scheduler["beta_schedule"], scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]
    )
    return schedule_of_betas(betas, zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)))


def latent_shape_of(vae: nn.Module) -> tuple[int, int]:
    """(channels, pixels per latent) of a VAE."""
    config: Any = vae.config
    return int(config.latent_channels), 2 ** (len(config.block_out_channels) - 1)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (n, 3, h, w) in [-1, 1] -> scaled latents (n, c, h/8, w/8), the mode of the VAE's distribution."""
    mode: Tensor = vae.encode(pixels.to(vae.device, torch.float32)).latent_dist.mode()
    shift, scale = _latent_scale(vae)
    return (mode - shift) * scale


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """The way back, clamped to [-1, 1], on the CPU; always float32, the SDXL VAE overflows in fp16."""
    shift, scale = _latent_scale(vae)
    unscaled = latents.to(vae.device, torch.float32) / scale + shift
    pictures = [vae.decode(one[None]).sample for one in unscaled]
    return torch.cat(pictures).clamp(-1, 1).cpu()


def _latent_scale(vae: Any) -> tuple[float, float]:
    return float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)


def sample_latents(
    predict: Predict,
    conditioning: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    noise: Tensor,
    settings: SamplingSettings,
    scheduler_config: dict[str, Any],
) -> Tensor:
    """Latents (n, c, h, w) out of unit noise (n, c, h, w); conditioning: wanted and unwanted, of n prompts each."""
    positive, negative = conditioning
    both = {key: torch.cat([negative[key], positive[key]]) for key in positive}

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        if settings.guidance_scale == 1:
            return predict(latents, timestep, positive).float()
        output = predict(torch.cat([latents, latents]), timestep, both).float()
        unconditional, conditional = output.chunk(2)
        return guided(conditional, unconditional, settings.guidance_scale)

    return sample_euler(
        denoise, noise, scheduler_config=scheduler_config, num_inference_steps=settings.num_inference_steps
    )


def noise_for(
    shape: tuple[int, int], generators: Sequence[Generator], settings: SamplingSettings, device: torch.device
) -> Tensor:
    """Unit noise (n, c, h, w) for pictures of the settings' size. shape: (channels, pixels per latent)."""
    channels, factor = shape
    return initial_noise((channels, settings.height_px // factor, settings.width_px // factor), generators).to(device)


def write_checkpoint(
    components: Components | SDComponents,
    path: Path,
    description: Description,
    layout: Layout,
    dtype: torch.dtype | None,
    change: Change | None,
) -> None:
    """The whole model in a layout; see `Model.write_checkpoint`. Raises UserError for a full disk."""
    match layout:
        case "single-file":
            write_single_file(components, path, description, dtype=dtype, change=change)
        case "folder":
            write_folder(components, path, description, dtype=dtype, change=change)
        case _:
            assert_never(layout)


def digest_vae(vae: Any) -> str:
    """A digest of all that makes latents: the weights, and how latents are shifted and scaled."""
    shift, scale = _latent_scale(vae)
    return f"{digest_weights(vae)} {shift} {scale}"


def digest_tokenizers(*tokenizers: Tokenizer) -> str:
    """A digest of how captions become tokens: vocabulary, padding, and what becomes of a text with every rule in it."""
    probe = "A photo of  3 cats' café, (red:1.2) don't_stop\n日本 🦊"
    digest = hashlib.blake2b(digest_size=16)
    for tokenizer in tokenizers:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        reading = tokenizer.encode(probe, add_special_tokens=False)
        digest.update(repr((vocabulary, tokenizer.pad_token_id, tokenizer.model_max_length, reading)).encode())
    return digest.hexdigest()


def digest_weights(*networks: nn.Module) -> str:
    """A digest of all weights, by name and value."""
    digest = hashlib.blake2b(digest_size=16)
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
