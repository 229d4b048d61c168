"""Writes a whole checkpoint as a single file in the original layout.

The values are those that the networks hold at that moment: the caller has put the averaged weights into them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.errors import user_error
from sdtrain.families.adapter_names import plain_names
from sdtrain.families.family import Family
from sdtrain.families.modelspec import Description, spec_metadata
from sdtrain.families.original_names import Place, places_of
from sdtrain.families.published_configs import CLIP_L_TEXT, SCHEDULER
from sdtrain.families.words import Component
from sdtrain.files.hashes import Hashes
from sdtrain.files.header import Entry, Header
from sdtrain.files.tensors import NAMES, Planned, in_order, write_safetensors
from sdtrain.models.checkpoints.components import Components
from sdtrain.models.checkpoints.configs_from_shapes import config_of
from sdtrain.models.checkpoints.markers import (
    CONFIGS_KEY,
    NO_CAPTION_KEY,
    V_PREDICTION_KEY,
    ZERO_TERMINAL_KEY,
    file_markers,
    single_file_scheduler,
)

Change = Callable[[Component, str, Tensor], Tensor]
"""Maps a component, a parameter's name and its value to the value that is written instead, of the same shape."""

LOGIT_SCALE = math.log(100.0)
"""OpenCLIP's temperature, which all published SDXL files hold and only OpenCLIP's own training reads."""


def write_single_file(
    components: Components,
    path: Path,
    description: Description,
    *,
    dtype: torch.dtype | None = None,
    change: Change | None = None,
) -> str:
    """Write a checkpoint in the original layout, whole or not at all.

    Returns the file's hash, `0x` and the sha256 of its tensors. dtype: the type in which all weights are stored;
    None stores each network as it was stored before. Raises UserError for a full disk and for values that are not
    finite in that type.
    """
    family = components.family
    if family.no_single_file:
        raise user_error(str(path), "format", family.no_single_file)
    tensors = planned_tensors(components, dtype, change)
    metadata = {
        "format": "pt",
        **spec_metadata(description, family, components.scheduler_config),
        NO_CAPTION_KEY: components.no_caption,
        **configs_metadata(components, path, tensors),
    }
    hashes = write_safetensors(path, tensors, metadata, seal=seal, finite_only=True)
    return f"0x{hashes.data}"


def planned_tensors(components: Components, dtype: torch.dtype | None, change: Change | None) -> dict[str, Planned]:
    """Return the tensors of a whole checkpoint by their original names."""
    tensors: dict[str, Planned] = {}
    for component in components.family.components:
        weights = changed_weights(component, components.networks[component], change)
        tensors |= original_tensors(components.family, component, weights, dtype or components.stored_dtypes[component])
    return tensors | constant_tensors(components, dtype)


def order_of_weights(components: Components, dtype: torch.dtype | None) -> list[tuple[Component, str]]:
    """Return the parameters in the order in which `write_single_file` asks `change` for them: nothing is written."""
    asked: list[tuple[Component, str]] = []

    def note(component: Component, name: str, weight: Tensor) -> Tensor:
        asked.append((component, name))
        return torch.empty(weight.shape, device="meta")

    tensors = planned_tensors(components, dtype, note)
    for name in in_order({name: tensor.dtype for name, tensor in tensors.items()}):
        tensors[name].values()
    return asked


def seal(hashes: Hashes) -> dict[str, str]:
    """Return the header entry with a file's hash that the model specification asks for."""
    return {"modelspec.hash_sha256": f"0x{hashes.data}"}


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's own parameters by name; layers that carry an adapter are named as if they had none."""
    named = dict(network.named_parameters())
    return {plain: named[name] for plain, name in plain_names(named).items()}


@dataclass(frozen=True)
class Weight:
    """A parameter that will be written: its shape now, its value only when it is its turn, so that one is in memory."""

    shape: tuple[int, ...]
    value: Callable[[], Tensor]


def changed_weights(component: Component, network: nn.Module, change: Change | None) -> dict[str, Weight]:
    """Return every parameter of a network, by its own name, as it will be written."""

    def later(name: str, tensor: Tensor) -> Weight:
        value = (lambda: tensor) if change is None else (lambda: change(component, name, tensor))
        return Weight(tuple(tensor.shape), value)

    return {name: later(name, tensor) for name, tensor in weights_of(network).items()}


def original_tensors(
    family: Family, component: Component, weights: Mapping[str, Weight], dtype: torch.dtype
) -> dict[str, Planned]:
    """Return the tensors of one network in the original layout; fused ones are put together from their thirds."""
    by_key: dict[str, list[tuple[Place, Weight]]] = {}
    for name, place in places_of(family, component, weights).items():
        by_key.setdefault(place.key, []).append((place, weights[name]))
    return {key: _joined(dtype, sorted(parts, key=lambda part: part[0].third or 0)) for key, parts in by_key.items()}


def _joined(dtype: torch.dtype, parts: list[tuple[Place, Weight]]) -> Planned:
    place, weight = parts[0]
    first = original_form(torch.empty(weight.shape, device="meta"), place).shape
    if len(parts) == 1:
        return Planned(dtype, tuple(first), lambda: original_form(weight.value(), place))
    shape = (first[0] * len(parts), *first[1:])
    return Planned(dtype, shape, lambda: torch.cat([original_form(part.value(), where) for where, part in parts]))


def original_form(tensor: Tensor, place: Place) -> Tensor:
    """Return a parameter in the shape that the original layout gives it."""
    match place.form:
        case "transposed":
            return tensor.T
        case "convolution":
            return tensor[:, :, None, None]
        case "same":
            return tensor


def constant_tensors(components: Components, dtype: torch.dtype | None) -> dict[str, Planned]:
    """Return the tensors that are no parameters: the published files' constants, and markers of the noise schedule."""
    planned = {}
    first = components.family.text_encoders[0].component
    length: int = network_config(components.networks[first])["max_position_embeddings"]
    for key in components.family.constants:
        if key.endswith("position_ids"):
            planned[key] = Planned(torch.int64, (1, length), lambda: torch.arange(length)[None])
        else:
            planned[key] = Planned(dtype or components.stored_dtypes[first], (), lambda: torch.tensor(LOGIT_SCALE))
    scheduler = components.scheduler_config
    if scheduler.get("prediction_type") == "v_prediction":
        planned[V_PREDICTION_KEY] = Planned(torch.float32, (0,), lambda: torch.empty(0))
    if scheduler.get("rescale_betas_zero_snr"):
        planned[ZERO_TERMINAL_KEY] = Planned(torch.float32, (0,), lambda: torch.empty(0))
    return planned


# ---- what shapes do not tell ----


def configs_metadata(components: Components, path: Path, tensors: Mapping[str, Planned]) -> dict[str, str]:
    """Return a header entry with the configurations that do not follow from the file itself; mostly it is empty."""
    entries = {key: Entry(NAMES[tensor.dtype], tensor.shape, 0, 0) for key, tensor in tensors.items()}
    header = Header(path, entries, {})
    configs: dict[str, dict[str, Any]] = {}
    for component in components.family.components:
        actual = network_config(components.networks[component])
        derived = config_of(header, components.family, component)
        if not _same_config(actual, derived):
            configs[component] = actual
    usual = single_file_scheduler({}, file_markers(header))
    if any(components.scheduler_config.get(key, SCHEDULER[key]) != usual[key] for key in SCHEDULER if key[0] != "_"):
        configs["scheduler"] = dict(components.scheduler_config)
    return {CONFIGS_KEY: json.dumps(configs, sort_keys=True)} if configs else {}


def network_config(network: nn.Module) -> dict[str, Any]:
    """Return the configuration of a network as plain JSON values."""
    config: Any = network.config
    if isinstance(config, Mapping):
        kept = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    else:
        content = config.to_dict()
        kept = {key: content[key] for key in CLIP_L_TEXT if key in content}
        kept["architectures"] = [type(network).__name__]
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def _same_config(actual: Mapping[str, Any], derived: Mapping[str, Any]) -> bool:
    """Return whether two configurations make the same network; one number for all blocks equals a list of it."""
    blocks = len(derived.get("block_out_channels", [0]))
    return all(
        _spread(actual.get(key), blocks) == _spread(value, blocks)
        for key, value in derived.items()
        if key not in ("_class_name", "sample_size") and (key in actual or value is not None)
    )


def _spread(value: Any, blocks: int) -> Any:
    """Return a single number as a list with one for each block, and anything else as it is."""
    return [value] * blocks if isinstance(value, int) and not isinstance(value, bool) else value
