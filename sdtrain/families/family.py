"""What a family of models is made of, as one record that everything else asks; no torch.

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
    """One text encoder of a family: its place in files and how much of it is read."""

    component: Component
    prefix: str
    """What its keys in a single file start with."""
    lora_prefix: str
    """What its layers in a LoRA file of sd-scripts start with."""
    config: Mapping[str, Any]
    """The published configuration."""
    layout: TextLayout = "clip"
    """Whether single files lay it out as transformers does, or as OpenCLIP does: fused projections, other names."""
    pooled: bool = False
    """Whether a projection at its end gives one vector for the whole text."""
    last_layer_read: bool = True
    """Whether anything reads the output of its last layer and its final norm."""
    spare_layers: int = 0
    """Layers at the end that single files hold and the network lacks, because nobody reads them."""
    constants: tuple[str, ...] = ()
    """Keys below the prefix that single files have besides parameters; readers may leave them out."""
    tokenizer: str = "tokenizer"
    """The folder of its tokenizer."""
    pad_token: str = ""
    """The padding where CLIP's vocabulary is shared by several encoders; empty: the vocabulary's own."""

    def unread_ends(self, num_layers: int) -> tuple[str, ...]:
        """Ends of the names of those modules whose output nobody reads, in a network of so many layers."""
        return () if self.last_layer_read else (f"encoder.layers.{num_layers - 1}", "final_layer_norm")


@dataclass(frozen=True)
class Words:
    """What other tools call models of the family, in headers (modelspec 1.0.1, sd-scripts) and in diffusers' index."""

    architecture: str
    implementation: str
    """Whose names the tensors of a single file have."""
    lora_implementation: str
    base_version: str
    """sd-scripts' `ss_base_model_version`."""
    pipeline: str
    """The class of diffusers that loads a folder."""
    architecture_large_v: str = ""
    """Of models that predict v and were trained above 512 px; empty: the same."""
    base_version_v: str = ""
    """Of models that predict v; empty: the same."""
    second_version: bool = False
    """sd-scripts' `ss_v2`."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """More entries of `model_index.json`."""
    index_says_zeros: bool = False
    """Whether that class of diffusers asks the index what no caption is, and takes zeros where it does not say."""


@dataclass(frozen=True)
class Family:
    """Everything that sets a family apart from the others, but for how its networks compute."""

    name: FamilyName
    title: str
    """What people call it."""
    text_encoders: tuple[TextEncoder, ...]
    words: Words
    resolution_px: int
    """Side of the square pictures it was made for."""
    unet: Mapping[str, Any]
    """The published configuration of the U-Net; shapes decide what they can."""
    vae: Mapping[str, Any]
    """The published configuration of the VAE, the scaling of latents included, which stands in no tensor."""
    resolution_v_px: int = 0
    """The same of models that predict v; 0: the same."""
    takes_sizes: bool = False
    """Whether the U-Net is told the sizes of pictures, and the pooled text, beside the time."""
    num_heads: int = 0
    """Heads of every attention layer of the U-Net; 0: as many as heads of the usual width fit."""
    text_width: int = 0
    """Width of the text that the U-Net reads, where that tells the family apart; 0: any."""
    linear_projections: bool | None = None
    """Whether the U-Net's attention goes through linear layers, where that tells the family apart."""
    unet_prefix: str = "model.diffusion_model."
    vae_prefix: str = "first_stage_model."
    lora_in_original_layout: bool = False
    """Whether sd-scripts names the U-Net's layers by the original layout, or by that of diffusers."""
    no_caption: NoCaption = "empty-text"
    """What no caption is where a model does not say."""
    no_single_file: str = ""
    """Why no single file can be written; empty: it can."""

    @property
    def components(self) -> tuple[Component, ...]:
        """The networks, in the order in which files are written."""
        return (DENOISER, *(encoder.component for encoder in self.text_encoders), "vae")

    @property
    def trainable(self) -> tuple[Component, ...]:
        """The networks that can be trained: all but the VAE."""
        return (DENOISER, *(encoder.component for encoder in self.text_encoders))

    def text_encoder(self, component: Component) -> TextEncoder | None:
        """The record of a text encoder; None for another network."""
        return next((encoder for encoder in self.text_encoders if encoder.component == component), None)

    @property
    def pooled_encoder(self) -> TextEncoder | None:
        """The text encoder whose one vector for the whole text the U-Net reads beside the sizes; None without."""
        return next((encoder for encoder in self.text_encoders if encoder.pooled and self.takes_sizes), None)

    def prefix_of(self, component: Component) -> str:
        """What the keys of a network start with in a single file. Raises KeyError for one the family does not have."""
        text = {encoder.component: encoder.prefix for encoder in self.text_encoders}
        return {DENOISER: self.unet_prefix, "vae": self.vae_prefix, **text}[component]

    @property
    def constants(self) -> tuple[str, ...]:
        """Keys that single files have besides parameters; their values never change."""
        return tuple(encoder.prefix + key for encoder in self.text_encoders for key in encoder.constants)

    def native_resolution(self, *, predicts_v: bool) -> Resolution:
        """The size of the pictures that a model was made for, where it does not say."""
        side = (self.resolution_v_px if predicts_v else 0) or self.resolution_px
        return side, side

    def architecture(self, *, predicts_v: bool, resolution_px: int) -> str:
        """The model specification's name of a model."""
        large_v = predicts_v and resolution_px > 512
        return (self.words.architecture_large_v if large_v else "") or self.words.architecture
