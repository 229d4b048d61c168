"""Writes a whole checkpoint as a diffusers folder, with tokenizers and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtrain.errors import user_error
from sdtrain.families.modelspec import Description, spec_metadata
from sdtrain.families.original_names import with_text_prefix
from sdtrain.families.words import DENOISER, Component
from sdtrain.files.tensors import Planned, write_safetensors
from sdtrain.files.writer import atomic_folder, write_json
from sdtrain.models.checkpoints.components import Components
from sdtrain.models.checkpoints.locate import INDEX, STEMS
from sdtrain.models.checkpoints.markers import FORCE_ZEROS_KEY
from sdtrain.models.checkpoints.single_file import Change, changed_weights, network_config, seal
from sdtrain.models.checkpoints.tokenizers import copy_tokenizer


def write_folder(
    components: Components,
    path: Path,
    description: Description,
    *,
    dtype: torch.dtype | None = None,
    change: Change | None = None,
) -> None:
    """Write a diffusers folder, whole or not at all; an older one under the same name is replaced.

    dtype: the type in which all weights are stored; None stores each network as it was stored before. Raises
    UserError for a full disk, for values that are not finite in that type, and rather than replacing a folder that
    is no model.
    """
    if path.exists() and not (path / INDEX).is_file():
        raise user_error(str(path), "output", f"is there already and is no diffusers folder (no {INDEX}); move it away")
    family = components.family
    plans = {
        component: folder_tensors(components, component, dtype or components.stored_dtypes[component], change)
        for component in family.components
    }
    metadata = {"format": "pt", **spec_metadata(description, family, components.scheduler_config)}
    metadata["modelspec.implementation"] = "diffusers"
    num_bytes = sum(tensor.num_bytes for plan in plans.values() for tensor in plan.values())
    with atomic_folder(path, num_bytes) as folder:
        for component, plan in plans.items():
            (folder / component).mkdir()
            weights = folder / component / f"{STEMS[component]}.safetensors"
            write_safetensors(weights, plan, metadata, seal=seal, finite_only=True)
            write_json(folder / component / "config.json", folder_config(components.networks[component], plan))
        for source, encoder in zip(components.tokenizer_sources, family.text_encoders, strict=True):
            copy_tokenizer(source, folder / encoder.tokenizer)
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", components.scheduler_config)
        write_json(folder / INDEX, model_index(components))


def folder_tensors(
    components: Components, component: Component, dtype: torch.dtype, change: Change | None
) -> dict[str, Planned]:
    """Return a network's tensors under the names that all versions of diffusers and transformers read."""
    is_text = components.family.text_encoder(component) is not None
    return {
        with_text_prefix(name) if is_text else name: Planned(dtype, weight.shape, weight.value)
        for name, weight in changed_weights(component, components.networks[component], change).items()
    }


def folder_config(network: nn.Module, plan: Mapping[str, Planned]) -> dict[str, Any]:
    """Return the configuration of a network with the version or the type that its library looks for.

    diffusers looks for its own version, transformers for the type of the weights.
    """
    import diffusers

    config = network_config(network)
    if "model_type" in config:
        return {**config, "dtype": str(next(iter(plan.values())).dtype).removeprefix("torch.")}
    return {**config, "_diffusers_version": diffusers.__version__}


def model_index(components: Components) -> dict[str, Any]:
    """Return the content of `model_index.json`: which class reads which part of the folder."""
    import diffusers

    index: dict[str, Any] = {
        "_class_name": components.family.words.pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", components.scheduler_config.get("_class_name", "EulerDiscreteScheduler")],
        DENOISER: ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        **components.family.words.index,
    }
    for encoder in components.family.text_encoders:
        index[encoder.component] = ["transformers", f"CLIPTextModel{'WithProjection' if encoder.pooled else ''}"]
        index[encoder.tokenizer] = ["transformers", "CLIPTokenizer"]
    if components.family.words.index_says_zeros or components.no_caption == "zeros":
        index[FORCE_ZEROS_KEY] = components.no_caption == "zeros"
    return index
