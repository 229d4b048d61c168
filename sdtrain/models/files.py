"""Checkpoints on disk, in whatever layout, become components in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtrain.config.schema import ModelConfig
from sdtrain.models.inspect import model_folder, read_json
from sdtrain.models.prompts import Tokenizer


@dataclass
class Components:
    """The parts of an SDXL-style model, as read; nothing is moved or frozen yet."""

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    tokenizer: Tokenizer
    tokenizer_2: Tokenizer
    scheduler_config: dict[str, Any]
    zeros_for_empty_prompt: bool


def load_components(config: ModelConfig, dtype: torch.dtype) -> Components:
    """The components `config.path` names, U-Net and text encoders in `dtype`, the VAE in float32."""
    folder = model_folder(config.path)
    return _load_folder(folder, config.variant or None, dtype)


def _load_folder(folder: Path, variant: str | None, dtype: torch.dtype) -> Components:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    index = read_json(folder / "model_index.json")
    return Components(
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", variant=variant, torch_dtype=dtype),
        vae=AutoencoderKL.from_pretrained(folder / "vae", variant=variant, torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", variant=variant, dtype=dtype),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(
            folder / "text_encoder_2", variant=variant, dtype=dtype
        ),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", False)),
    )
