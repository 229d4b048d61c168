"""Loads the parts of a model that was opened, whatever its layout, into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sdtrain.families.family import Family
from sdtrain.families.words import DENOISER, Component, NoCaption
from sdtrain.models.checkpoints.fill import Fill, Stored, fill
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.checkpoints.networks import Loaded, load_network, load_vae
from sdtrain.models.checkpoints.tokenizers import TokenizerSource, load_tokenizer
from sdtrain.models.prompts import Tokenizer


@dataclass(frozen=True)
class Components:
    """The parts of a model as they were read; nothing is moved to a device or frozen yet."""

    family: Family
    networks: Mapping[Component, nn.Module]
    tokenizers: tuple[Tokenizer, ...]
    """One tokenizer per text encoder, in the family's order."""
    scheduler_config: dict[str, Any]
    no_caption: NoCaption
    stored_dtypes: Mapping[Component, torch.dtype]
    """The type that each network's weights have on disk."""
    tokenizer_sources: tuple[TokenizerSource, ...]
    """Where the tokenizers came from."""
    stored: Mapping[Component, Mapping[str, Stored]] = field(default_factory=dict)
    """Where each parameter of each network lies on disk."""

    @property
    def unet(self) -> nn.Module:
        """The U-Net, the network that denoises."""
        return self.networks[DENOISER]

    @property
    def vae(self) -> nn.Module:
        """The VAE, the network between pixels and latents."""
        return self.networks["vae"]

    @property
    def text_encoders(self) -> dict[Component, nn.Module]:
        """The text encoders by name, in the family's order."""
        return {encoder.component: self.networks[encoder.component] for encoder in self.family.text_encoders}


def load_components(opened: OpenedModel, dtype: torch.dtype, fill: Fill = fill) -> Components:
    """Load the parts of a model: the U-Net and the text encoders in `dtype`, the VAE in float32.

    fill: what gives the networks their weights. Peak memory is that of the networks and of one tensor more. Raises
    UserError for everything that does not fit.
    """
    networks = _load_networks(opened, dtype, fill)
    return Components(
        family=opened.family,
        networks={part: loaded.network for part, loaded in networks.items()},
        tokenizers=tuple(load_tokenizer(source) for source in opened.tokenizers),
        scheduler_config=dict(opened.scheduler),
        no_caption=opened.no_caption,
        stored_dtypes={part: loaded.stored_dtype for part, loaded in networks.items()},
        tokenizer_sources=opened.tokenizers,
        stored={part: loaded.stored for part, loaded in networks.items()},
    )


def _load_networks(opened: OpenedModel, dtype: torch.dtype, fill: Fill) -> dict[Component, Loaded]:
    text = [encoder.component for encoder in opened.family.text_encoders]
    networks = {part: load_network(opened, part, dtype, fill) for part in (*text, DENOISER)}
    if opened.vae:
        networks["vae"] = load_vae(opened.vae, opened.family, torch.float32, fill)
    else:
        networks["vae"] = load_network(opened, "vae", torch.float32, fill)
    return networks
