"""The header of an adapter file, in the keys that other tools read.

`modelspec.*` is Stability's model metadata standard 1.0.1; `ss_*` are the keys sd-scripts writes, which the web
interfaces show; `sshs_*` are the hashes they identify a file by; `sdtrain.*` are our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdtrain.diffusion.words import Prediction
from sdtrain.families.family import Family
from sdtrain.families.metadata import CONFIG_KEY, D_KEY, TAGS_KEY, resolution_entry, steps_entry
from sdtrain.families.modelspec import lora_words
from sdtrain.families.words import Resolution
from sdtrain.files.numbers import is_number

ALPHA_KEY = "sdtrain.alpha"
DIFFUSERS_KEY = "lora_adapter_metadata"
OTHER_ROTATIONS = {"block_share": "one rotation for all blocks", "coft": "rotations up to a limit"}
"""Settings of peft's OFT under which a file means something that is not computed here."""
OF_THE_FILE = (
    *("sshs_", "ss_network_", "ss_output_name", "modelspec.hash", "modelspec.title", "modelspec.date", "format"),
    *("modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", ALPHA_KEY, DIFFUSERS_KEY),
)
"""How the keys begin that are about one file alone, and are made anew for one that is made of it."""


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the header entries of a file that are as true of one with the same change in another shape."""
    return {key: value for key, value in metadata.items() if not key.startswith(OF_THE_FILE)}


@dataclass(frozen=True)
class FileFacts:
    """What only the run knows about the file it writes. Empty strings and zeros leave their keys out."""

    title: str
    date: str
    """The time of writing in the form of `now`: `2026-11-22T15:00:00Z`."""
    prediction: Prediction = "epsilon"
    resolution_px: Resolution = (1024, 1024)
    """The width and height of the pictures."""
    steps: int = 0
    num_images: int = 0
    """The number of different pictures in the data."""
    num_epochs: int = 0
    base_model: str = ""
    """The name of the model's file or folder, without the path to it."""
    optimizer: str = ""
    tag_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Folder -> tag -> number of captions that have it."""
    config_toml: str = ""
    """The resolved config of the run, as TOML."""
    d: Mapping[str, float] = field(default_factory=dict)
    """The step size d by network, from which another run can start (`method.init_from`)."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Further header entries, which are written as they are where nothing above says otherwise."""


@dataclass(frozen=True)
class Shape:
    """How large the adapters are, as the header tells it."""

    family: Family
    kinds: frozenset[str]
    ranks: Mapping[int, int]
    """rank -> number of layers."""
    alphas: Mapping[float, int]
    """alpha -> number of layers."""


def header_metadata(facts: FileFacts, shape: Shape, *, in_diffusers_names: bool) -> dict[str, str]:
    """Return all header entries except the hashes; the same input gives the same strings."""
    predicts_v = facts.prediction == "v_prediction"
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        **lora_words(
            shape.family,
            predicts_v=predicts_v,
            resolution_px=max(facts.resolution_px),
            in_diffusers_names=in_diffusers_names,
        ),
        "modelspec.title": facts.title,
        "modelspec.date": facts.date,
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        **resolution_entry(facts.resolution_px),
        "ss_output_name": facts.title,
        "ss_resolution": f"({facts.resolution_px[0]}, {facts.resolution_px[1]})",
        **_network_keys(shape),
    }
    optional = {
        "ss_sd_model_name": facts.base_model,
        **steps_entry(facts.steps),
        "ss_num_train_images": str(facts.num_images or ""),
        "ss_num_epochs": str(facts.num_epochs or ""),
        "ss_optimizer": facts.optimizer,
        TAGS_KEY: _json(facts.tag_counts) if facts.tag_counts else "",
        CONFIG_KEY: facts.config_toml,
        D_KEY: _json(facts.d) if facts.d else "",
    }
    return {**facts.more, **found, **{key: value for key, value in optional.items() if value}}


def _network_keys(shape: Shape) -> dict[str, str]:
    """Return sd-scripts' entries for the module that makes the network, its rank and its alpha.

    `Dynamic` is its word for ranks or alphas that differ.
    """
    algorithm = next(iter(sorted(shape.kinds)), "lora")
    plain = algorithm == "lora"
    keys = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": _one_or_dynamic(shape.ranks),
        "ss_network_alpha": _one_or_dynamic(shape.alphas),
    }
    if not plain:
        arguments = {"algo": "lora", "dora_wd": "True"} if algorithm == "dora" else {"algo": algorithm}
        keys["ss_network_args"] = _json(arguments)
    return keys


def _one_or_dynamic(counts: Mapping[int, int] | Mapping[float, int]) -> str:
    values = list(counts)
    return f"{values[0]:g}" if len(values) == 1 else "Dynamic"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def number_of(value: object, key: str) -> float:
    """Return a number that stands in the JSON under a key. Raises ValueError, as a sentence, for what is none."""
    if not is_number(value):
        raise ValueError(f"cannot be read: `{key}` in the header has {str(value)[:40]!r} where a number belongs")
    return float(value)


def json_table(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the JSON object under a key, empty without the key. Raises ValueError, as a sentence, for the rest."""
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"cannot be read: `{key}` in the header is no JSON table, fetch the file again")
    return found


def other_rotations(metadata: Mapping[str, str]) -> list[str]:
    """Return the settings of peft's OFT under which a file means something that is not computed here.

    Raises ValueError where its settings are no table.
    """
    table = json_table(metadata, DIFFUSERS_KEY)
    asked = {name.split(".")[-1] for name, value in table.items() if value}
    return [setting for setting in OTHER_ROTATIONS if setting in asked]
