"""A tiny SDXL-shaped model and pictures made from numbers alone, so that nothing shipped with sdtrain moves them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
SIZES = ((64, 64), (64, 64), (96, 64), (64, 96), (64, 64), (96, 64))
CAPTIONS = ("a cat", "two dogs", "a red house", "", "a tree by the sea", "one more cat")
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def write_model(folder: Path) -> None:
    """A diffusers folder of a model with weights drawn from fixed seeds; about 0.2 million parameters."""
    networks = {
        "unet": UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=48,
            attention_head_dim=(2, 4),
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=64,
        ),
        "text_encoder": CLIPTextModel(_text_config(16)),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(32)),
    }
    for index, (name, network) in enumerate(networks.items()):
        draw_weights(network, seed=index)
        network.save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        _write_tokenizer(folder / name)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(
        folder / "model_index.json",
        {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False},
    )


def draw_weights(network: nn.Module, seed: int) -> None:
    """Fill a network from a generator of its own: matrices by their fan-in, scales around one, shifts around zero."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (parameter[0].numel() ** -0.5))
            else:
                parameter.copy_(0.1 * noise + float("norm" in name and name.endswith("weight")))


def write_pictures(folder: Path) -> None:
    """Six small pictures of three shapes, each with its caption."""
    folder.mkdir(parents=True)
    for index, (size, caption) in enumerate(zip(SIZES, CAPTIONS, strict=True)):
        picture = Image.new("RGB", size, (40 * index, 255 - 40 * index, 128))
        ImageDraw.Draw(picture).rectangle((8 + index, 12, 40, 50 - index), fill=(255, 30 * index, 0))
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")


def _text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=3,
        projection_dim=width,
        vocab_size=2 * 26 + 2,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        max_position_embeddings=77,
        hidden_act="gelu",
    )


def _write_tokenizer(folder: Path) -> None:
    """Single letters, inside a word and at its end."""
    letters = string.ascii_lowercase
    words = [*letters, *(letter + "</w>" for letter in letters), *SPECIAL]
    _write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[1],
            "unk_token": SPECIAL[1],
            "pad_token": SPECIAL[1],
            "model_max_length": 77,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
