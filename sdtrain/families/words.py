"""The words of the families: which there are and which networks a model can have; no torch."""

from __future__ import annotations

from typing import Literal, get_args

FamilyName = Literal["sdxl", "sd1", "sd2"]

Component = Literal["unet", "vae", "text_encoder", "text_encoder_2"]

TrainableNetwork = Literal["unet", "text_encoder", "text_encoder_2"]
"""Networks that can be trained; the VAE is not."""

TRAINABLE_NETWORKS: tuple[TrainableNetwork, ...] = get_args(TrainableNetwork)

DENOISER: TrainableNetwork = "unet"
"""The network that denoises; all other trainable ones read captions."""

NoCaption = Literal["empty-text", "zeros"]
"""What a model takes for no caption: the encoded empty string, or zeros."""

LORA_UNET_PREFIX = "lora_unet_"
"""What the U-Net's layers start with in sd-scripts' names, in all families."""

LATENT_FACTOR_PX = 8
"""Pixels per latent of the VAEs of all families, in each direction."""

Resolution = tuple[int, int]
"""Width and height of pictures in pixels."""
