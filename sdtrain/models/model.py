"""What the training loop needs of a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sdtrain.diffusion.schedule import NoiseSchedule
from sdtrain.diffusion.words import Prediction
from sdtrain.families.family import Family
from sdtrain.families.modelspec import Description
from sdtrain.families.words import NoCaption
from sdtrain.models.checkpoints.single_file import Change

Layout = Literal["single-file", "folder"]


@dataclass(frozen=True)
class SamplingSettings:
    """How a picture is sampled: Euler steps, classifier-free guidance (1: off), size in pixels."""

    num_inference_steps: int
    guidance_scale: float
    width_px: int
    height_px: int


class Model(Protocol):
    """A family of diffusion models: its networks by name, and how pictures and captions reach them."""

    @property
    def family(self) -> Family:
        """What its family is made of."""

    @property
    def device(self) -> torch.device:
        """Where the U-Net computes."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks that can be trained: `unet`, `text_encoder`, ..."""

    @property
    def unused_layers(self) -> Mapping[str, tuple[str, ...]]:
        """Prefixes of module names whose output nobody reads, per network; they never enter a group."""

    @property
    def schedule(self) -> NoiseSchedule:
        """How much signal is left at every timestep."""

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The same as diffusers' Euler scheduler reads it, for sampling."""

    @property
    def prediction(self) -> Prediction:
        """What the U-Net predicts."""

    @property
    def no_caption(self) -> NoCaption:
        """What the model takes for no caption."""

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(channels, pixels per latent) of the VAE."""

    def fingerprints(self) -> tuple[str, str]:
        """Digests of the VAE's and of the text encoders' weights, for the cache."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, h, w) in [-1, 1] -> scaled latents (n, c, h/8, w/8) float32."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The way back, clamped to [-1, 1], on the CPU."""

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The conditioning of n captions, each tensor with n in front; differentiable.

        An empty caption is no caption, wherever it comes from: dropped, missing, or a negative prompt left out. All of
        them get the same bits, see `no_caption`.
        """

    def encode_sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        """The conditioning of n sizes, each tensor with n in front; empty for families that know no sizes.

        sizes: (n, 6) float32, original height and width, crop top and left, target height and width, in pixels.
        """

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The U-Net's output for noisy latents (n, c, h, w), timesteps (n,) and conditioning by captions and sizes."""

    def move_encoders(self, device: torch.device, *, text: bool) -> None:
        """Put the VAE (and with `text` the text encoders) on a device."""

    def write_checkpoint(
        self,
        path: Path,
        description: Description,
        *,
        layout: Layout,
        dtype: torch.dtype | None = None,
        change: Change | None = None,
    ) -> None:
        """The whole model as its networks are now, as one file in the original layout or as a diffusers folder.

        dtype: of the stored weights; None: of each network as it was stored. change: what is written instead of a
        weight, e.g. the weight with its adapter merged in.
        """
