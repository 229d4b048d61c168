"""What all families share, as plain functions: the VAE around the latents, the noise schedule, loading and saving."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from sdtrain.config.schema import ModelConfig
from sdtrain.diffusion.schedule import NoiseSchedule, betas_of, schedule_of_betas
from sdtrain.diffusion.words import Prediction
from sdtrain.families.modelspec import Description
from sdtrain.families.words import NoCaption
from sdtrain.matmul import tf32
from sdtrain.models.checkpoints.components import Components
from sdtrain.models.checkpoints.folder import write_folder
from sdtrain.models.checkpoints.single_file import Change, write_single_file
from sdtrain.models.model import Layout
from sdtrain.models.placing import sent
from sdtrain.models.prompts import Tokenizer
from sdtrain.models.tiles import InTiles, in_tiles

EncodeText = Callable[[Sequence[str]], dict[str, Tensor]]
"""Maps n texts to what the text encoders make of them: tensors by name, each with n in front."""


def resolved(components: Components, config: ModelConfig) -> Components:
    """Return the components with the user's own choices in place of `auto`: what is trained, sampled and written."""
    return replace(
        components,
        scheduler_config=resolved_scheduler(components.scheduler_config, config),
        no_caption=components.no_caption if config.no_caption == "auto" else config.no_caption,
    )


def encode_captions(encode: EncodeText, captions: Sequence[str], no_caption: NoCaption) -> dict[str, Tensor]:
    """Return the conditioning of n captions, an empty one conditioned as `no_caption` says; gradients flow through it.

    The empty string is encoded alone: the last bits of an encoding depend on how many texts are encoded together,
    and no caption is to be the same bits in a batch, in the cache and in a preview.
    """
    texts = [caption for caption in captions if caption.strip()]
    if len(texts) == len(captions):
        return encode(texts)
    nothing = encode([""])
    if no_caption == "zeros":
        nothing = {key: torch.zeros_like(value) for key, value in nothing.items()}
    if texts:
        encoded = encode(texts)
        nothing = {key: torch.cat([value, encoded[key]]) for key, value in nothing.items()}
    rows = iter(range(1, len(texts) + 1))
    order = torch.tensor([next(rows) if caption.strip() else 0 for caption in captions])
    return {key: value[sent(order, value.device)] for key, value in nothing.items()}


def resolved_scheduler(scheduler: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return the scheduler's configuration with the user's own choices in place of `auto`.

    A schedule that ends in pure noise is sampled from there: trailing timesteps (arXiv 2305.08891, section 3.3).
    """
    resolved = dict(scheduler)
    if config.prediction != "auto":
        resolved["prediction_type"] = config.prediction
    if config.zero_terminal_snr != "auto":
        resolved["rescale_betas_zero_snr"] = config.zero_terminal_snr == "on"
    if config.zero_terminal_snr == "on":
        resolved["timestep_spacing"] = "trailing"
    return resolved


def prediction_of(scheduler: Mapping[str, Any]) -> Prediction:
    """Return what the U-Net predicts, read from its scheduler's configuration."""
    return "v_prediction" if scheduler.get("prediction_type") == "v_prediction" else "epsilon"


def schedule_of(scheduler: Mapping[str, Any]) -> NoiseSchedule:
    """Return the noise schedule of a scheduler's configuration. Raises ValueError for betas that are not known."""
    betas = betas_of(
        scheduler["beta_schedule"], scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]
    )
    return schedule_of_betas(betas, zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)))


def latent_shape_of(vae: nn.Module) -> tuple[int, int]:
    """Return the number of a VAE's latent channels, and the width in pixels that one latent stands for."""
    config: Any = vae.config
    return int(config.latent_channels), 2 ** (len(config.block_out_channels) - 1)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor, tiled: set[InTiles]) -> Tensor:
    """Encode pixels (n, 3, h, w) in [-1, 1] into scaled latents (n, c, h/8, w/8), float32.

    The latents are the mode of the VAE's distribution, so that nothing is drawn at random. tiled: is added to where
    they are encoded in tiles, for want of memory.
    """
    with tf32(vae.device):
        mode = _encoded(vae, pixels.to(vae.device, torch.float32), tiled)
    shift, scale = _latent_scale(vae)
    return (mode - shift) * scale


def _encoded(vae: Any, there: Tensor, tiled: set[InTiles]) -> Tensor:
    try:
        mode: Tensor = vae.encode(there).latent_dist.mode()
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # which hold what was computed so far
        with in_tiles(vae):
            mode = vae.encode(there).latent_dist.mode()
        tiled.add("encoded")
    return mode


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor, beside: nn.Module, tiled: set[InTiles]) -> Tensor:
    """Decode scaled latents (n, c, h/8, w/8) into pixels (n, 3, h, w) in [-1, 1], float32 on the CPU.

    The VAE computes in float32, because that of SDXL overflows in float16. beside: the U-Net, which leaves the device
    for a moment where both do not fit; no number changes by it. tiled: is added to where even then they are decoded in
    tiles.
    """
    shift, scale = _latent_scale(vae)
    unscaled = latents.to(vae.device, torch.float32) / scale + shift
    with tf32(vae.device):
        pictures = [_decoded(vae, one[None], beside, tiled) for one in unscaled]
    return torch.cat(pictures).clamp(-1, 1).cpu()


def _decoded(vae: Any, unscaled: Tensor, beside: nn.Module, tiled: set[InTiles]) -> Tensor:
    try:
        whole: Tensor = vae.decode(unscaled).sample
        return whole
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
    place = next(beside.parameters()).device
    if place.type == "cpu" or hasattr(beside, "reshard"):  # it is split over processes, which move it together
        with in_tiles(vae):
            whole = vae.decode(unscaled).sample
        tiled.add("decoded")
        return whole
    try:
        beside.to("cpu")
        return _decoded(vae, unscaled, beside, tiled)
    finally:
        beside.to(place)


def _latent_scale(vae: Any) -> tuple[float, float]:
    return float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)


def write_checkpoint(
    components: Components,
    path: Path,
    description: Description,
    layout: Layout,
    dtype: torch.dtype | None,
    change: Change | None,
) -> None:
    """Write the whole model in a layout, see `Model.write_checkpoint`. Raises UserError for a full disk."""
    match layout:
        case "single-file":
            write_single_file(components, path, description, dtype=dtype, change=change)
        case "folder":
            write_folder(components, path, description, dtype=dtype, change=change)
        case _:
            assert_never(layout)


def fingerprints(components: Components, caption_chunks: int) -> tuple[str, str]:
    """Return two digests: of all that makes latents of pictures, and of all that makes conditioning of captions.

    The second one covers what stands for no caption, too.
    """
    text = digest_weights(*components.text_encoders.values())
    reading = digest_tokenizers(*components.tokenizers)
    return digest_vae(components.vae), f"{text} {reading} {caption_chunks} {components.no_caption}"


def move_encoders(components: Components, device: torch.device, *, text: bool) -> None:
    """Move the VAE, and with `text` the text encoders too, to a device."""
    components.vae.to(device)
    for encoder in components.text_encoders.values() if text else ():
        encoder.to(device)


def unused_layers(components: Components) -> dict[str, tuple[str, ...]]:
    """Return the names of the modules whose output nobody reads, by network; networks without any are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for encoder in components.family.text_encoders:
        network: Any = components.networks[encoder.component]
        ends = encoder.unread_ends(int(network.config.num_hidden_layers))
        if ends:
            found[encoder.component] = tuple(name for name, _ in network.named_modules() if name.endswith(ends))
    return found


def freeze(components: Components) -> None:
    """Freeze every network and put it into evaluation mode."""
    for network in components.networks.values():
        network.requires_grad_(False).eval()


def digest_vae(vae: Any) -> str:
    """Return a digest of all that makes latents: the VAE's weights, and how latents are shifted and scaled."""
    shift, scale = _latent_scale(vae)
    return f"{digest_weights(vae)} {shift} {scale}"


def digest_tokenizers(*tokenizers: Tokenizer) -> str:
    """Return a digest of how captions become tokens.

    It covers the vocabulary, the padding, and the tokens of a text that needs every rule of a tokenizer.
    """
    probe = "A photo of  3 cats' café, (red:1.2) don't_stop\n日本 🦊"
    digest = hashlib.blake2b(digest_size=16)
    for tokenizer in tokenizers:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        reading = tokenizer.encode(probe, add_special_tokens=False)
        digest.update(repr((vocabulary, tokenizer.pad_token_id, tokenizer.model_max_length, reading)).encode())
    return digest.hexdigest()


def digest_weights(*networks: nn.Module) -> str:
    """Return a digest of all weights of the networks, by name, type, shape and value."""
    digest = hashlib.blake2b(digest_size=16)
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
