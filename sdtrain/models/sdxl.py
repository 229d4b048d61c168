"""The SDXL family: two text encoders, pooled text and sizes as extra conditioning."""

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
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.single_file import Change
from sdtrain.models.model import Layout, SamplingSettings
from sdtrain.models.prompts import Tokenizer, token_chunks


class SDXL:
    """SDXL, its fine-tunes and its smaller relatives. Fulfils `Model`."""

    def __init__(self, components: Components, config: ModelConfig, device: torch.device, caption_chunks: int) -> None:
        self._device = device
        self._caption_chunks = caption_chunks
        self.unet: Any = components.unet
        self.vae: Any = components.vae
        self.networks: dict[str, nn.Module] = {
            "unet": components.unet,
            "text_encoder": components.text_encoder,
            "text_encoder_2": components.text_encoder_2,
        }
        self.unused_layers = {"text_encoder": _unused_text_layers(components.text_encoder)}
        self.scheduler_config = latent_diffusion.resolved_scheduler(components.scheduler_config, config)
        self.components = replace(components, scheduler_config=self.scheduler_config)  # what an export writes
        self.prediction = latent_diffusion.prediction_of(self.scheduler_config)
        self.schedule = latent_diffusion.schedule_of(self.scheduler_config)
        self.latent_shape = latent_diffusion.latent_shape_of(components.vae)
        for network in (*self.networks.values(), self.vae):
            network.requires_grad_(False).eval()
        self.unet.to(device)

    def fingerprints(self) -> tuple[str, str]:
        """Digests of all that makes latents of pictures, and of all that makes conditioning of captions."""
        parts = self.components
        text = latent_diffusion.digest_weights(parts.text_encoder, parts.text_encoder_2)
        reading = latent_diffusion.digest_tokenizers(parts.tokenizer, parts.tokenizer_2)
        return latent_diffusion.digest_vae(self.vae), f"{text} {reading} {self._caption_chunks}"

    def move_encoders(self, device: torch.device, *, text: bool) -> None:
        """Put the VAE (and with `text` the text encoders) on a device."""
        self.vae.to(device)
        if text:
            self.networks["text_encoder"].to(device)
            self.networks["text_encoder_2"].to(device)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, h, w) in [-1, 1] -> scaled latents (n, c, h/8, w/8)."""
        return latent_diffusion.encode_pixels(self.vae, pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The way back, clamped to [-1, 1], on the CPU."""
        return latent_diffusion.decode_latents(self.vae, latents)

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """prompt_embeds (n, 77 chunks, both widths) and pooled (n, width of the second), as SDXL reads captions."""
        first, _ = self._encode("text_encoder", self.components.tokenizer, captions)
        second, pooled = self._encode("text_encoder_2", self.components.tokenizer_2, captions)
        assert pooled is not None
        return {"prompt_embeds": torch.cat([first, second], dim=-1), "pooled": pooled}

    def _encode(self, name: str, tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        encoder: Any = self.networks[name]
        ids = token_chunks(tokenizer, captions, self._caption_chunks)
        num, chunks, length = ids.shape
        output = encoder(ids.view(num * chunks, length).to(encoder.device), output_hidden_states=True)
        hidden = output.hidden_states[-2].unflatten(0, (num, chunks)).flatten(1, 2)
        if name == "text_encoder":
            return hidden, None
        return hidden, output.text_embeds.unflatten(0, (num, chunks))[:, 0]

    def unconditional(self, negative_prompts: Sequence[str]) -> dict[str, Tensor]:
        """The conditioning guidance moves away from: zeros for an empty prompt where the model was trained so."""
        conditioning = self.encode_captions(negative_prompts)
        if self.components.zeros_for_empty_prompt:
            empty = [index for index, prompt in enumerate(negative_prompts) if not prompt]
            for tensor in conditioning.values():
                tensor[empty] = 0.0
        return conditioning

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], time_ids: Tensor) -> Tensor:
        """The U-Net's output (n, c, h, w); inputs are moved to its device and type."""
        device, dtype = self._device, self.unet.dtype
        output = self.unet(
            noisy.to(device, dtype),
            timesteps.to(device),
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled"].to(device, dtype),
                "time_ids": time_ids.to(device),  # float32: sizes such as 1337 have no place in bfloat16
            },
            return_dict=False,
        )[0]
        assert isinstance(output, Tensor)
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
        height, width = settings.height_px, settings.width_px
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)

        def predict(latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
            return self.predict(latents, timestep, conditioning, sizes.repeat(len(latents), 1))

        noise = latent_diffusion.noise_for(self.latent_shape, generators, settings, self._device)
        latents = latent_diffusion.sample_latents(predict, (positive, negative), noise, settings, self.scheduler_config)
        return self.decode_latents(latents)


def load_sdxl(config: ModelConfig, *, device: torch.device, dtype: torch.dtype, caption_chunks: int = 1) -> SDXL:
    """The SDXL-style model that `config` names: frozen, in evaluation mode, its U-Net on `device`."""
    return SDXL(load_components(config, dtype), config, device, caption_chunks)


def _unused_text_layers(encoder: Any) -> tuple[str, ...]:
    """SDXL reads the last but one hidden state of the first text encoder, so its last layer does nothing."""
    last = int(encoder.config.num_hidden_layers) - 1
    names = [name for name, _ in encoder.named_modules()]
    return tuple(name for name in names if name.endswith((f"encoder.layers.{last}", "final_layer_norm")))
