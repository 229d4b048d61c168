"""Header entries after Stability AI's model specification 1.0.1, which inference tools display and obey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdtrain.families.family import Family
from sdtrain.families.metadata import now, resolution_entry
from sdtrain.families.words import Resolution

KEPT = ("author", "license", "description", "tags", "trigger_phrase", "usage_hint", "thumbnail")
"""What people wrote about a file and what is said again of one that is made of it."""


def spoken(**words: str) -> dict[str, str]:
    """Return header entries of the model specification by their names in it; empty ones are left out."""
    return {f"modelspec.{name}": text for name, text in words.items() if text}


def kept_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the header entries of a file that one made of it says again."""
    keys = [f"modelspec.{name}" for name in KEPT]
    return {key: metadata[key] for key in keys if metadata.get(key)}


@dataclass(frozen=True)
class Description:
    """What people should read about a file.

    resolution_px: the size of the pictures that it was trained on. date: in ISO 8601, empty for now.
    """

    title: str
    resolution_px: Resolution
    date: str = ""
    author: str = ""
    text: str = ""
    license: str = ""
    more: Mapping[str, str] = field(default_factory=dict)
    """Further header entries, which are written as they are, such as the run's settings."""


def spec_metadata(description: Description, family: Family, scheduler: Mapping[str, Any]) -> dict[str, str]:
    """Return the header entries of a whole checkpoint. The writer adds the hash, as it alone knows the bytes.

    scheduler: the configuration of the noise schedule, which says what the model predicts.
    """
    predicts_v = scheduler.get("prediction_type") == "v_prediction"
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architecture(
            predicts_v=predicts_v, resolution_px=max(description.resolution_px)
        ),
        "modelspec.implementation": family.words.implementation,
        "modelspec.title": description.title,
        "modelspec.date": description.date or now(),
        **resolution_entry(description.resolution_px),
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        "modelspec.predict_key": "v" if predicts_v else "epsilon",  # ComfyUI's name for the same
        "modelspec.author": description.author,
        "modelspec.description": description.text,
        "modelspec.license": description.license,
    }
    return {**description.more, **{key: value for key, value in entries.items() if value}}


def lora_words(family: Family, *, predicts_v: bool, resolution_px: int, in_diffusers_names: bool) -> dict[str, str]:
    """Return the header entries of a LoRA that name the model below it, in the standard's and in sd-scripts' words.

    resolution_px: the longer side of the pictures that it was trained on. in_diffusers_names: whether its layers are
    called as diffusers calls them; the standard's implementation is the code base whose names the tensors have.
    """
    words = family.words
    return {
        "modelspec.architecture": f"{family.architecture(predicts_v=predicts_v, resolution_px=resolution_px)}/lora",
        "modelspec.implementation": "diffusers" if in_diffusers_names else words.lora_implementation,
        "ss_base_model_version": (words.base_version_v if predicts_v else "") or words.base_version,
        "ss_v2": str(words.second_version),
    }
