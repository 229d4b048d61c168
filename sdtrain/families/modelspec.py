"""Metadata of model files after Stability AI's model specification 1.0.1, which inference tools display and obey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, assert_never

from sdtrain.families.metadata import Resolution, now, resolution_entry
from sdtrain.families.words import Family


@dataclass(frozen=True)
class Description:
    """What people should read about a file. resolution_px: the size of pictures it was trained on; date: ISO 8601."""

    title: str
    resolution_px: Resolution
    date: str = ""
    author: str = ""
    text: str = ""
    license: str = ""
    more: Mapping[str, str] = field(default_factory=dict)
    """Further header entries as they are, such as the run's settings."""


def spec_metadata(description: Description, family: Family, scheduler: Mapping[str, Any]) -> dict[str, str]:
    """Header entries of a whole checkpoint. The hash is added by the writer, which alone knows the bytes."""
    predicts_v = scheduler.get("prediction_type") == "v_prediction"
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture(family, predicts_v=predicts_v, resolution_px=description.resolution_px),
        "modelspec.implementation": implementation(family),
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


def architecture(family: Family, *, predicts_v: bool, resolution_px: Resolution) -> str:
    """The specification's name of a family."""
    match family:
        case "sdxl":
            return "stable-diffusion-xl-v1-base"
        case "sd1":
            return "stable-diffusion-v1"
        case "sd2":
            return "stable-diffusion-v2-768-v" if predicts_v and max(resolution_px) > 512 else "stable-diffusion-v2-512"
        case _:
            assert_never(family)


def implementation(family: Family) -> str:
    """Whose names the tensors have."""
    return (
        "https://github.com/Stability-AI/generative-models"
        if family == "sdxl"
        else "https://github.com/CompVis/stable-diffusion"
    )
