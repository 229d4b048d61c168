"""The SDXL family: two text encoders, and pooled text and picture sizes as further conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.config.schema import ModelConfig
from sdtrain.families.modelspec import Description
from sdtrain.families.words import Component
from sdtrain.models import latent_diffusion
from sdtrain.models.checkpoints.components import Components
from sdtrain.models.checkpoints.single_file import Change, order_of_weights
from sdtrain.models.model import Layout
from sdtrain.models.placing import sent
from sdtrain.models.prompts import Tokenizer, token_chunks
from sdtrain.models.tiles import InTiles


class SDXL:
    """A model of SDXL, a fine-tune of it or one of its smaller relatives. Fulfils `Model`."""

    def __init__(self, components: Components, config: ModelConfig, device: torch.device, caption_chunks: int) -> None:
        self.components = latent_diffusion.resolved(components, config)
        self.family = components.family
        self.device = device
        self.tiled: set[InTiles] = set()
        self._caption_chunks = caption_chunks
        self.unet: Any = components.unet
        self.vae: Any = components.vae
        self.networks: dict[str, nn.Module] = {name: components.networks[name] for name in components.family.trainable}
        self.unused_layers = latent_diffusion.unused_layers(components)
        self.scheduler_config = self.components.scheduler_config
        self.no_caption = self.components.no_caption
        self.prediction = latent_diffusion.prediction_of(self.scheduler_config)
        self.schedule = latent_diffusion.schedule_of(self.scheduler_config)
        self.latent_shape = latent_diffusion.latent_shape_of(components.vae)
        latent_diffusion.freeze(components)

    def fingerprints(self) -> tuple[str, str]:
        """Return two digests: of all that makes latents of pictures, and of all that makes conditioning of captions."""
        return latent_diffusion.fingerprints(self.components, self._caption_chunks)

    def place(self) -> None:
        """Move the U-Net to `device`, where it stays: once what encodes has made room there."""
        self.unet.to(self.device)

    def move_encoders(self, device: torch.device, *, text: bool) -> None:
        """Move the VAE, and with `text` the text encoders too, to a device."""
        latent_diffusion.move_encoders(self.components, device, text=text)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode pixels (n, 3, h, w) in [-1, 1] into scaled latents (n, c, h/8, w/8), float32."""
        return latent_diffusion.encode_pixels(self.vae, pixels, self.tiled)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (n, c, h/8, w/8) into pixels (n, 3, h, w) in [-1, 1], on the CPU."""
        return latent_diffusion.decode_latents(self.vae, latents, self.unet, self.tiled)

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return prompt_embeds (n, 77 chunks, both widths) and pooled (n, width of the second encoder) of n captions.

        An empty caption is conditioned as `no_caption` says.
        """
        return latent_diffusion.encode_captions(self._encode, captions, self.no_caption)

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        first, second = self.components.tokenizers
        hidden_1, _ = self._read("text_encoder", first, texts)
        hidden_2, pooled = self._read("text_encoder_2", second, texts)
        assert pooled is not None
        return {"prompt_embeds": torch.cat([hidden_1, hidden_2], dim=-1), "pooled": pooled}

    def _read(self, name: Component, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        encoder: Any = self.networks[name]
        ids = token_chunks(tokenizer, texts, self._caption_chunks)
        num, chunks, length = ids.shape
        output = encoder(sent(ids.view(num * chunks, length), encoder.device), output_hidden_states=True)
        hidden = output.hidden_states[-2].unflatten(0, (num, chunks)).flatten(1, 2)
        if name == "text_encoder":
            return hidden, None
        return hidden, output.text_embeds.unflatten(0, (num, chunks))[:, 0]

    def encode_sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        """Return time_ids (n, 6): the sizes in pixels, in float32 because bfloat16 cannot hold a number like 1337."""
        return {"time_ids": sizes}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Return the U-Net's output (n, c, h, w); its inputs are moved to its device and type."""
        device, dtype = self.device, self.unet.dtype
        output = self.unet(
            noisy.to(device, dtype),
            timesteps.to(device),
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled"].to(device, dtype),
                "time_ids": conditioning["time_ids"].to(device),
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
        """Write the whole model as its networks are now, as one file in the original layout or a diffusers folder."""
        latent_diffusion.write_checkpoint(self.components, path, description, layout, dtype, change)

    def order_of_weights(self, dtype: torch.dtype | None) -> list[tuple[Component, str]]:
        """Return the parameters in the order in which one file of the whole model asks for them."""
        return order_of_weights(self.components, dtype)
