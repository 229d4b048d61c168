"""Imported by the process that others are forked from: all that a run needs is then there already."""

from __future__ import annotations

import diffusers.models.unets.unet_2d_condition
import peft
import transformers.models.clip.modeling_clip

import sdtrain.models.sdxl
import sdtrain.training.fit

__all__ = ["diffusers", "peft", "sdtrain", "transformers"]
