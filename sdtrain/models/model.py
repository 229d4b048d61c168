"""The Protocol that every model family fulfils: all that the training loop needs of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sdtrain.diffusion.schedule import NoiseSchedule
from sdtrain.diffusion.words import Prediction, Sampler
from sdtrain.families.family import Family
from sdtrain.families.modelspec import Description
from sdtrain.families.words import Component, NoCaption
from sdtrain.models.checkpoints.single_file import Change
from sdtrain.models.tiles import InTiles

Layout = Literal["single-file", "folder"]


@dataclass(frozen=True)
class SamplingSettings:
    """How a picture is sampled: the number of steps, the guidance scale (1 is off) and the size in pixels.

    guidance_rescale: how far the spread of guided predictions is put right, from 0 (not at all) to 1.
    """

    num_inference_steps: int
    guidance_scale: float
    width_px: int
    height_px: int
    guidance_rescale: float = 0.0
    sampler: Sampler = "euler"


class Model(Protocol):
    """A family of diffusion models: its networks by name, and how pictures and captions reach them."""

    @property
    def family(self) -> Family:
        """The record of what models of this family are made of."""

    @property
    def device(self) -> torch.device:
        """The device on which the U-Net computes."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks that can be trained: `unet`, `text_encoder`, ..."""

    @property
    def unused_layers(self) -> Mapping[str, tuple[str, ...]]:
        """The prefixes of module names whose output nobody reads, per network; these modules are never trained."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule: how much signal is left at every timestep."""

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The noise schedule's configuration as diffusers' Euler scheduler reads it, for sampling."""

    @property
    def prediction(self) -> Prediction:
        """What the U-Net predicts: the noise (epsilon) or v."""

    @property
    def no_caption(self) -> NoCaption:
        """What conditions the U-Net where a picture has no caption: the encoded empty string, or zeros."""

    @property
    def latent_shape(self) -> tuple[int, int]:
        """The number of the VAE's latent channels, and the width in pixels that one latent stands for."""

    @property
    def tiled(self) -> set[InTiles]:
        """What was done in tiles so far, for want of memory."""

    def fingerprints(self) -> tuple[str, str]:
        """Return two digests, one of all that makes latents and one of all that makes conditioning, for the cache."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode pixels (n, 3, h, w) in [-1, 1] into scaled latents (n, c, h/8, w/8), float32."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (n, c, h/8, w/8) into pixels (n, 3, h, w) in [-1, 1], on the CPU."""

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning of n captions by name, each tensor with n in front; gradients flow through it.

        An empty caption is no caption, wherever it comes from: dropped, missing, or a negative prompt left out.
        All of them get the same bits, see `no_caption`.
        """

    def encode_sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        """Return the conditioning of n sizes by name, each tensor with n in front; empty for families without sizes.

        sizes: (n, 6) float32, original height and width, crop top and left, target height and width, in pixels.
        """

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Return the U-Net's output (n, c, h, w) for noisy latents of that shape, timesteps (n,) and the conditioning.

        The conditioning is that of captions and sizes together.
        """

    def place(self) -> None:
        """Move the U-Net to `device`, where it stays; until then it lies where it was read, and cannot predict."""

    def move_encoders(self, device: torch.device, *, text: bool) -> None:
        """Move the VAE, and with `text` the text encoders too, to a device."""

    def write_checkpoint(
        self,
        path: Path,
        description: Description,
        *,
        layout: Layout,
        dtype: torch.dtype | None = None,
        change: Change | None = None,
    ) -> None:
        """Write the whole model as its networks are now, as one file in the original layout or as a diffusers folder.

        dtype: the type in which all weights are stored; None stores each network as it was stored before.
        change: gives the value to write instead of a weight, for example the weight with its adapter merged in.
        """
        ...

    def order_of_weights(self, dtype: torch.dtype | None) -> list[tuple[Component, str]]:
        """Return the parameters in the order in which one file of the whole model asks `change` for them."""
