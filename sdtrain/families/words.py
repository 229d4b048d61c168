"""The words that settings and records share: the families, the networks that a model can have; no torch."""

from __future__ import annotations

from typing import Literal, get_args

FamilyName = Literal["sdxl", "sd1", "sd2"]

Component = Literal["unet", "vae", "text_encoder", "text_encoder_2"]

TrainableNetwork = Literal["unet", "text_encoder", "text_encoder_2"]
"""The networks that can be trained: all but the VAE."""

TRAINABLE_NETWORKS: tuple[TrainableNetwork, ...] = get_args(TrainableNetwork)

DENOISER: TrainableNetwork = "unet"
"""The network that denoises; all other trainable ones read captions."""

NoCaption = Literal["empty-text", "zeros"]
"""What conditions the U-Net where a picture has no caption: the encoded empty string, or zeros."""

LORA_UNET_PREFIX = "lora_unet_"
"""The prefix of the U-Net's layers in sd-scripts' names, the same in all families."""

LATENT_FACTOR_PX = 8
"""The pixels per latent of the VAEs of all families, in each direction."""

Resolution = tuple[int, int]
"""The width and height of pictures, in pixels."""
