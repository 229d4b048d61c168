"""Checkpoints on disk, in whatever layout, become components in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, assert_never

import torch
from torch import nn

from sdtrain.config.schema import ModelConfig
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.words import Component, Family
from sdtrain.models.checkpoints.locate import (
    Checkpoint,
    DiffusersFolder,
    locate,
    missing_parts,
    open_checkpoint,
    read_json,
)
from sdtrain.models.checkpoints.markers import scheduler_of
from sdtrain.models.checkpoints.networks import Loaded, load_network, load_vae
from sdtrain.models.checkpoints.tokenizers import TokenizerSource, find_tokenizers, load_tokenizer
from sdtrain.models.checkpoints.vae import vae_source
from sdtrain.models.prompts import Tokenizer


@dataclass
class Components:
    """The parts of an SDXL-style model, as read; nothing is moved or frozen yet.

    stored_dtypes: the type each network's weights have on disk. tokenizer_sources: where the tokenizers came from.
    """

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    tokenizer: Tokenizer
    tokenizer_2: Tokenizer
    scheduler_config: dict[str, Any]
    zeros_for_empty_prompt: bool
    stored_dtypes: dict[Component, torch.dtype] = field(default_factory=dict)
    tokenizer_sources: tuple[TokenizerSource, ...] = ()
    family: Family = "sdxl"

    def network(self, component: Component) -> nn.Module:
        """A network by its name."""
        match component:
            case "unet":
                return self.unet
            case "vae":
                return self.vae
            case "text_encoder":
                return self.text_encoder
            case "text_encoder_2":
                return self.text_encoder_2
            case _:
                assert_never(component)


@dataclass
class SDComponents:
    """The parts of an SD 1.x or 2.x model, as read."""

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: Tokenizer
    scheduler_config: dict[str, Any]
    stored_dtypes: dict[Component, torch.dtype]
    tokenizer_sources: tuple[TokenizerSource, ...]
    family: Family
    zeros_for_empty_prompt: bool = False

    def network(self, component: Component) -> nn.Module:
        """A network by its name."""
        match component:
            case "unet":
                return self.unet
            case "vae":
                return self.vae
            case "text_encoder":
                return self.text_encoder
            case "text_encoder_2":
                raise KeyError(component)
            case _:
                assert_never(component)


def load_components(config: ModelConfig, dtype: torch.dtype) -> Components:
    """The components `config.path` names, U-Net and text encoders in `dtype`, the VAE in float32.

    Peak memory is the networks themselves and one tensor more. Raises UserError for everything that does not fit.
    """
    checkpoint = open_checkpoint(locate(config.path, config.variant), config.variant)
    if checkpoint.family != "sdxl":
        raise user_error(
            str(checkpoint.path),
            "model.path",
            f"is a Stable Diffusion {checkpoint.family[2:]}.x model, not an SDXL one",
        )
    networks = load_networks(checkpoint, config, dtype)
    sources = find_tokenizers(checkpoint, config.components)
    return Components(
        unet=networks["unet"].network,
        vae=networks["vae"].network,
        text_encoder=networks["text_encoder"].network,
        text_encoder_2=networks["text_encoder_2"].network,
        tokenizer=load_tokenizer(sources[0]),
        tokenizer_2=load_tokenizer(sources[1]),
        scheduler_config=scheduler_of(checkpoint, config.components),
        zeros_for_empty_prompt=_zeros_for_empty_prompt(checkpoint),
        stored_dtypes={part: loaded.stored_dtype for part, loaded in networks.items()},
        tokenizer_sources=sources,
    )


def load_sd_components(config: ModelConfig, dtype: torch.dtype) -> SDComponents:
    """The components of an SD 1.x or 2.x model, U-Net and text encoder in `dtype`, the VAE in float32."""
    checkpoint = open_checkpoint(locate(config.path, config.variant), config.variant)
    if checkpoint.family == "sdxl":
        raise user_error(str(checkpoint.path), "model.path", "is an SDXL model, not a Stable Diffusion 1.x or 2.x one")
    networks = load_networks(checkpoint, config, dtype)
    sources = find_tokenizers(checkpoint, config.components)
    return SDComponents(
        unet=networks["unet"].network,
        vae=networks["vae"].network,
        text_encoder=networks["text_encoder"].network,
        tokenizer=load_tokenizer(sources[0]),
        scheduler_config=scheduler_of(checkpoint, config.components),
        stored_dtypes={part: loaded.stored_dtype for part, loaded in networks.items()},
        tokenizer_sources=sources,
        family=checkpoint.family,
    )


def load_networks(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> dict[Component, Loaded]:
    """The networks of a checkpoint, by component."""
    missing = missing_parts(checkpoint, own_vae=not config.vae)
    if missing:
        raise UserError(
            str(checkpoint.path),
            [
                Problem("model.vae" if part == "vae" else part, f"no {part} there; name or fetch one")
                for part in missing
            ],
        )
    text: tuple[Component, ...] = (
        ("text_encoder", "text_encoder_2") if checkpoint.family == "sdxl" else ("text_encoder",)
    )
    networks = {part: load_network(checkpoint, part, dtype, config.components) for part in (*text, "unet")}
    if config.vae:
        source = vae_source(config.vae, config.variant, checkpoint.family)
        networks["vae"] = load_vae(source, checkpoint.family, torch.float32)
    else:
        networks["vae"] = load_network(checkpoint, "vae", torch.float32, config.components)
    return networks


def _zeros_for_empty_prompt(checkpoint: Checkpoint) -> bool:
    """SDXL itself was sampled with zeros for an empty negative prompt; a folder may say otherwise."""
    if isinstance(checkpoint, DiffusersFolder):
        return bool(read_json(checkpoint.path / "model_index.json").get("force_zeros_for_empty_prompt", False))
    return True
