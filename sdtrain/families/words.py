"""The words of the families: which there are and which networks a model can have; no torch."""

from __future__ import annotations

from typing import Literal, get_args

Family = Literal["sdxl", "sd1", "sd2"]

Component = Literal["unet", "vae", "text_encoder", "text_encoder_2"]

TrainableNetwork = Literal["unet", "text_encoder", "text_encoder_2"]
"""Networks that can be trained; the VAE is not."""

TRAINABLE_NETWORKS: tuple[TrainableNetwork, ...] = get_args(TrainableNetwork)


COMPONENTS: dict[Family, tuple[Component, ...]] = {
    "sdxl": ("unet", "text_encoder", "text_encoder_2", "vae"),
    "sd1": ("unet", "text_encoder", "vae"),
    "sd2": ("unet", "text_encoder", "vae"),
}
