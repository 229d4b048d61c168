"""The SD 1.x and 2.x families: one text encoder, no extra conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sdtrain.config.schema import ModelConfig
from sdtrain.families.modelspec import Description
from sdtrain.models import latent_diffusion
from sdtrain.models.checkpoints.components import SDComponents, load_sd_components
from sdtrain.models.checkpoints.single_file import Change
from sdtrain.models.model import Layout, SamplingSettings
from sdtrain.models.prompts import token_chunks


class SD:
    """Stable Diffusion 1.x, 2.x and their fine-tunes. Fulfils `Model`."""

    def __init__(
        self, components: SDComponents, config: ModelConfig, device: torch.device, caption_chunks: int
    ) -> None:
        self._device = device
        self._caption_chunks = caption_chunks
        self.unet: Any = components.unet
        self.vae: Any = components.vae
        self.text_encoder: Any = components.text_encoder
        self.networks: dict[str, nn.Module] = {"unet": components.unet, "text_encoder": components.text_encoder}
        self.unused_layers: dict[str, tuple[str, ...]] = {}
        self.scheduler_config = latent_diffusion.resolved_scheduler(components.scheduler_config, config)
        self.components = replace(components, scheduler_config=self.scheduler_config)
        self.prediction = latent_diffusion.prediction_of(self.scheduler_config)
        self.schedule = latent_diffusion.schedule_of(self.scheduler_config)
        self.latent_shape = latent_diffusion.latent_shape_of(components.vae)
        for network in (*self.networks.values(), self.vae):
            network.requires_grad_(False).eval()
        self.unet.to(device)

    def fingerprints(self) -> tuple[str, str]:
        """Digests of all that makes latents of pictures, and of all that makes conditioning of captions."""
        text = latent_diffusion.digest_weights(self.text_encoder)
        reading = latent_diffusion.digest_tokenizers(self.components.tokenizer)
        return latent_diffusion.digest_vae(self.vae), f"{text} {reading} {self._caption_chunks}"

    def move_encoders(self, device: torch.device, *, text: bool) -> None:
        """Put the VAE (and with `text` the text encoder) on a device."""
        self.vae.to(device)
        if text:
            self.text_encoder.to(device)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, h, w) in [-1, 1] -> scaled latents (n, c, h/8, w/8)."""
        return latent_diffusion.encode_pixels(self.vae, pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The way back, clamped to [-1, 1], on the CPU."""
        return latent_diffusion.decode_latents(self.vae, latents)

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """prompt_embeds (n, 77 chunks, width): the encoder's output after its final norm."""
        ids = token_chunks(self.components.tokenizer, captions, self._caption_chunks)
        num, chunks, length = ids.shape
        output = self.text_encoder(ids.view(num * chunks, length).to(self.text_encoder.device))
        return {"prompt_embeds": output.last_hidden_state.unflatten(0, (num, chunks)).flatten(1, 2)}

    def unconditional(self, negative_prompts: Sequence[str]) -> dict[str, Tensor]:
        """The conditioning guidance moves away from: that of the caption, be it empty."""
        return self.encode_captions(negative_prompts)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], time_ids: Tensor) -> Tensor:
        """The U-Net's output (n, c, h, w); this family knows no sizes, `time_ids` are not read."""
        device, dtype = self._device, self.unet.dtype
        text = conditioning["prompt_embeds"].to(device, dtype)
        output: Tensor = self.unet(noisy.to(device, dtype), timesteps.to(device), text, return_dict=False)[0]
        return output

    def write_checkpoint(
        self,
        path: Path,
        description: Description,
        *,
        layout: Layout,
        dtype: torch.dtype | None = None,
        change: Change | None = None,
    ) -> None:
        """The whole model as its networks are now, as one file in the original layout or as a diffusers folder."""
        latent_diffusion.write_checkpoint(self.components, path, description, layout, dtype, change)

    @torch.no_grad()
    def sample(
        self,
        positive: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        generators: Sequence[Generator],
        settings: SamplingSettings,
    ) -> Tensor:
        """Pictures (n, 3, h, w) in [-1, 1] on the CPU for n prompts, each from its own CPU generator."""
        no_sizes = torch.empty(0)

        def predict(latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
            return self.predict(latents, timestep, conditioning, no_sizes)

        noise = latent_diffusion.noise_for(self.latent_shape, generators, settings, self._device)
        latents = latent_diffusion.sample_latents(predict, (positive, negative), noise, settings, self.scheduler_config)
        return self.decode_latents(latents)


def load_sd(config: ModelConfig, *, device: torch.device, dtype: torch.dtype, caption_chunks: int = 1) -> SD:
    """The SD 1.x or 2.x model that `config` names: frozen, in evaluation mode, its U-Net on `device`."""
    return SD(load_sd_components(config, dtype), config, device, caption_chunks)
