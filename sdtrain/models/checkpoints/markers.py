"""Reads what a model says about its own training.

That is what it predicts, whether its noise schedule ends in pure noise, and what stands for no caption.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from sdtrain.diffusion.words import Prediction
from sdtrain.errors import user_error
from sdtrain.families.published_configs import SCHEDULER
from sdtrain.families.words import NoCaption
from sdtrain.files.header import Header
from sdtrain.models.checkpoints.locate import INDEX, Checkpoint, DiffusersFolder, SingleFile, read_json

V_PREDICTION_KEY = "v_pred"
ZERO_TERMINAL_KEY = "ztsnr"
CONFIGS_KEY = "sdtrain.configs"
"""The header entry with those configurations, by component, that do not follow from shapes alone."""
NO_CAPTION_KEY = "sdtrain.no_caption"
"""The header entry with what the model takes for no caption; files of other tools do not have it."""
FORCE_ZEROS_KEY = "force_zeros_for_empty_prompt"
"""The entry in the `model_index.json` of a folder that says whether an empty prompt becomes zeros."""
MODELSPEC_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
MODELSPEC_NAMES: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}

NEEDED = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
"""The entries of a scheduler's configuration without which there is no noise schedule."""


@dataclass(frozen=True)
class Markers:
    """What a model says about its own training; None stands for what it does not say.

    prediction_source and zero_source: the keys that say so.
    """

    prediction: Prediction | None = None
    prediction_source: str = ""
    zero_terminal_snr: bool | None = None
    zero_source: str = ""


def file_markers(header: Header) -> Markers:
    """Return what a single file says about its training.

    Empty tensors under agreed names say it, or else the metadata does.
    """
    prediction: Prediction | None = None
    source = ""
    for key in MODELSPEC_KEYS:
        named = MODELSPEC_NAMES.get(header.metadata.get(key, "").lower())
        if named:
            prediction, source = named, key
    if V_PREDICTION_KEY in header.entries:
        prediction, source = "v_prediction", V_PREDICTION_KEY
    if ZERO_TERMINAL_KEY in header.entries:
        return Markers(prediction, source, True, ZERO_TERMINAL_KEY)
    return Markers(prediction, source)


def scheduler_markers(scheduler: Mapping[str, Any], path: Path) -> Markers:
    """Return what a scheduler's configuration says about the model's training.

    path: the configuration's file, for messages. Raises UserError for a prediction or a schedule that cannot be
    trained.
    """
    missing = [key for key in NEEDED if key not in scheduler]
    if missing:
        raise user_error(str(path), missing[0], "is missing; is this a whole model?")
    if scheduler["beta_schedule"] not in ("linear", "scaled_linear"):
        raise user_error(
            str(path), "beta_schedule", f"is {scheduler['beta_schedule']}; only linear and scaled_linear are known"
        )
    prediction = scheduler.get("prediction_type")
    if prediction not in ("epsilon", "v_prediction", None):
        raise user_error(
            str(path), "prediction_type", f"is {prediction}; only epsilon and v_prediction can be trained here"
        )
    zero = scheduler.get("rescale_betas_zero_snr")
    return Markers(
        prediction=cast(Prediction | None, prediction),
        prediction_source="scheduler/scheduler_config.json: prediction_type" if prediction else "",
        zero_terminal_snr=None if zero is None else bool(zero),
        zero_source="" if zero is None else "scheduler/scheduler_config.json: rescale_betas_zero_snr",
    )


def stored_configs(header: Header) -> dict[str, dict[str, Any]]:
    """Return the configurations that a single file carries in its header, by component.

    Raises UserError when they are not JSON.
    """
    text = header.metadata.get(CONFIGS_KEY, "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise user_error(str(header.path), CONFIGS_KEY, f"in the header is not readable JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(config, dict) for config in found.values()):
        raise user_error(str(header.path), CONFIGS_KEY, "in the header is no table of configurations")
    return found


def markers_of(checkpoint: Checkpoint) -> Markers:
    """Return what a checkpoint itself says about its training. Raises UserError as `scheduler_markers` does."""
    match checkpoint:
        case SingleFile(header):
            return file_markers(header)
        case DiffusersFolder(path):
            config = path / "scheduler" / "scheduler_config.json"
            return scheduler_markers(read_json(config), config)


def no_caption_of(checkpoint: Checkpoint) -> NoCaption:
    """Return what a checkpoint takes for no caption: its own word, or what is usual in its family.

    A single file of another tool says nothing; nearly all tools sample with the encoded empty string there. Raises
    UserError for a word that is not known.
    """
    match checkpoint:
        case SingleFile(header, family):
            word = header.metadata.get(NO_CAPTION_KEY, family.no_caption)
            if word not in get_args(NoCaption):
                what = f"in the header is {word}; only {' and '.join(get_args(NoCaption))} are known here"
                raise user_error(str(header.path), NO_CAPTION_KEY, what)
            return cast(NoCaption, word)
        case DiffusersFolder(path, _, family, index):
            force = index.get(FORCE_ZEROS_KEY)
            if force is None:
                return family.no_caption
            if not isinstance(force, bool):
                raise user_error(str(path / INDEX), FORCE_ZEROS_KEY, f"is {force!r}; it must be true or false")
            return "zeros" if force else "empty-text"


def scheduler_of(checkpoint: Checkpoint, fallback: Path | None) -> dict[str, Any]:
    """Return the configuration of the noise schedule, as diffusers' Euler scheduler reads it.

    A single file's own markers count more than the folder of `model.components`, which counts more than what was
    published.
    """
    match checkpoint:
        case DiffusersFolder(path):
            return read_json(path / "scheduler" / "scheduler_config.json")
        case SingleFile(header):
            config = stored_configs(header).get("scheduler") or _fallback_scheduler(fallback)
            return single_file_scheduler(config, file_markers(header))


def single_file_scheduler(fallback: Mapping[str, Any], markers: Markers) -> dict[str, Any]:
    """Return the published schedule, changed by what `fallback` says and then by what the file's own markers say."""
    config = {**SCHEDULER, **fallback}
    if markers.prediction:
        config["prediction_type"] = markers.prediction
    if markers.zero_terminal_snr:
        # Sampling has to start at pure noise then (arXiv 2305.08891, section 3.3).
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def _fallback_scheduler(fallback: Path | None) -> dict[str, Any]:
    path = fallback / "scheduler" / "scheduler_config.json" if fallback else None
    return read_json(path) if path and path.is_file() else {}
