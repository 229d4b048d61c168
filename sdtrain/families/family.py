"""The record of a model family: what its models are made of, as one thing that everything else asks; no torch.

A new family is a record of its own, an entry in `known.FAMILIES`, a file in `models/` that fulfils `Model`, its word in
`words.FamilyName` and one `case` in `models/load.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdtrain.families.words import DENOISER, Component, FamilyName, NoCaption, Resolution

TextLayout = Literal["clip", "open-clip"]


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family: where it lies in files and how much of it is read."""

    component: Component
    prefix: str
    """The prefix of its keys in a single file."""
    lora_prefix: str
    """The prefix of its layers' names in a LoRA file of sd-scripts."""
    config: Mapping[str, Any]
    """The published configuration; tensor shapes decide what they can."""
    layout: TextLayout = "clip"
    """How single files lay it out: as transformers does, or as OpenCLIP does, with fused projections."""
    pooled: bool = False
    """Whether a projection at its end gives one vector for the whole text."""
    last_layer_read: bool = True
    """Whether anything reads the output of its last layer and its final norm."""
    spare_layers: int = 0
    """The number of last layers that single files hold and the network lacks, because nobody reads them."""
    constants: tuple[str, ...] = ()
    """The keys below the prefix that single files have besides parameters; readers may ignore them."""
    tokenizer: str = "tokenizer"
    """The sub-folder of its tokenizer in a diffusers folder."""
    pad_token: str = ""
    """The padding to use with a vocabulary that several encoders share; empty keeps the vocabulary's own."""

    def unread_ends(self, num_layers: int) -> tuple[str, ...]:
        """Return how the names of those modules end whose output nobody reads, in a network of `num_layers` layers."""
        return () if self.last_layer_read else (f"encoder.layers.{num_layers - 1}", "final_layer_norm")


@dataclass(frozen=True)
class Words:
    """What other tools call models of the family: in headers (modelspec 1.0.1, sd-scripts) and in diffusers' index."""

    architecture: str
    implementation: str
    """The model specification's name for the layout of a single file."""
    lora_implementation: str
    base_version: str
    """The value of sd-scripts' `ss_base_model_version`."""
    pipeline: str
    """The class of diffusers that loads a folder of this family."""
    architecture_large_v: str = ""
    """The architecture of models that predict v and were trained above 512 px; empty where it is the same."""
    base_version_v: str = ""
    """The base version of models that predict v; empty where it is the same."""
    second_version: bool = False
    """The value of sd-scripts' `ss_v2`."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of `model_index.json`."""
    index_says_zeros: bool = False
    """Whether the pipeline asks `model_index.json` what no caption is, and takes zeros where that does not say."""


@dataclass(frozen=True)
class Family:
    """Everything that sets a family apart from the others, except how its networks compute."""

    name: FamilyName
    title: str
    """The name that people know it by."""
    text_encoders: tuple[TextEncoder, ...]
    words: Words
    resolution_px: int
    """The side of the square pictures that its models were made for."""
    unet: Mapping[str, Any]
    """The published configuration of the U-Net; tensor shapes decide what they can."""
    vae: Mapping[str, Any]
    """The published configuration of the VAE, with the scaling of latents, which no tensor shows."""
    resolution_v_px: int = 0
    """The side of the square pictures for models that predict v; 0 where it is the same."""
    takes_sizes: bool = False
    """Whether the U-Net is told the sizes of pictures, and the pooled text, beside the time."""
    num_heads: int = 0
    """The number of heads of every attention layer of the U-Net; 0 where heads have the usual width instead."""
    text_width: int = 0
    """The width of the text that the U-Net reads, where that tells the family apart; 0 where it does not."""
    linear_projections: bool | None = None
    """Whether the U-Net's attention projects by linear layers, where that tells the family apart; else None."""
    unet_prefix: str = "model.diffusion_model."
    vae_prefix: str = "first_stage_model."
    lora_in_original_layout: bool = False
    """Whether sd-scripts names the U-Net's layers by the original layout rather than by that of diffusers."""
    no_caption: NoCaption = "empty-text"
    """What the family takes for no caption where a model does not say."""
    no_single_file: str = ""
    """The reason why no single file can be written; empty where it can."""

    @property
    def components(self) -> tuple[Component, ...]:
        """The networks of a model, in the order in which files are written."""
        return (DENOISER, *(encoder.component for encoder in self.text_encoders), "vae")

    @property
    def trainable(self) -> tuple[Component, ...]:
        """The networks that can be trained: all but the VAE."""
        return (DENOISER, *(encoder.component for encoder in self.text_encoders))

    def text_encoder(self, component: Component) -> TextEncoder | None:
        """Return the record of a text encoder; None for another network."""
        return next((encoder for encoder in self.text_encoders if encoder.component == component), None)

    @property
    def pooled_encoder(self) -> TextEncoder | None:
        """The text encoder whose one vector for the whole text the U-Net reads beside the sizes; None without."""
        return next((encoder for encoder in self.text_encoders if encoder.pooled and self.takes_sizes), None)

    def prefix_of(self, component: Component) -> str:
        """Return the prefix of a network's keys in a single file. Raises KeyError for one the family does not have."""
        text = {encoder.component: encoder.prefix for encoder in self.text_encoders}
        return {DENOISER: self.unet_prefix, "vae": self.vae_prefix, **text}[component]

    @property
    def constants(self) -> tuple[str, ...]:
        """The keys that single files have besides parameters; their values never change."""
        return tuple(encoder.prefix + key for encoder in self.text_encoders for key in encoder.constants)

    def native_resolution(self, *, predicts_v: bool) -> Resolution:
        """Return the size of the pictures that a model was made for, which counts where the model does not say."""
        side = (self.resolution_v_px if predicts_v else 0) or self.resolution_px
        return side, side

    def architecture(self, *, predicts_v: bool, resolution_px: int) -> str:
        """Return the architecture of a model in the words of the model specification.

        resolution_px: the longer side of the pictures that it was trained on.
        """
        large_v = predicts_v and resolution_px > 512
        return (self.words.architecture_large_v if large_v else "") or self.words.architecture
