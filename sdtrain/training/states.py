"""Training states on disk, whole or not there at all. They hold y and z; exported weights hold x."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree, flatten_state, unflatten_state
from sdtrain.errors import UserError, user_error
from sdtrain.files.header import read_header
from sdtrain.files.tensors import planned, read_tensors, write_safetensors
from sdtrain.files.writer import atomic_folder, remove_folder, write_text
from sdtrain.training.parameters import Trainable

VERSION = 1
INDEX = "state.json"


@dataclass(frozen=True)
class SavedState:
    """A complete training state on disk, taken after `step` steps."""

    folder: Path
    step: int


def save_state(folder: Path, step: int, trainable: Trainable, optimizer: ProdigyPlusScheduleFree, keep: int) -> Path:
    """Write the state after `step` steps under `folder`, then remove all but the newest `keep`; return its folder.

    It is written under a temporary name and renamed when it is complete, so that a kill at any moment leaves whole
    states only. Raises UserError when it cannot be written, for example because the disk is full.
    """
    target = folder / f"step-{step:06d}"
    if (target / INDEX).exists():
        return target  # a step has one state: it was saved a moment ago
    state, metadata = flatten_state(optimizer.state_dict())
    parameters, tensors = planned(trainable.named_parameters()), planned(state)
    num_bytes = sum(tensor.num_bytes for tensor in (*parameters.values(), *tensors.values()))
    with atomic_folder(target, num_bytes) as partial:
        write_safetensors(partial / "parameters.safetensors", parameters, {})
        write_safetensors(partial / "optimizer.safetensors", tensors, metadata)
        write_text(partial / INDEX, json.dumps({"version": VERSION, "step": step}))
    for old in saved_states(folder)[:-keep]:
        remove_folder(old.folder)
    return target


def saved_states(folder: Path) -> list[SavedState]:
    """Return the complete states under a folder, oldest first."""
    found = []
    for entry in folder.glob("step-*"):
        if re.fullmatch(r"step-\d+", entry.name) and (entry / INDEX).exists():  # a user's copy has another name
            found.append(SavedState(entry, int(entry.name.removeprefix("step-"))))
    return sorted(found, key=lambda state: state.step)


def load_state(state: SavedState, trainable: Trainable, optimizer: ProdigyPlusScheduleFree) -> int:
    """Put a saved state back, bit for bit; return its step. Raises UserError if it is damaged or of another run."""
    version = json.loads((state.folder / INDEX).read_text(encoding="utf-8"))["version"]
    if version != VERSION:
        raise user_error(str(state.folder), "version", f"found {version}, this sdtrain reads {VERSION}")
    parameters, _ = _read(state.folder / "parameters.safetensors")
    _require_same_names(state.folder, parameters, trainable.named_parameters())
    tensors, metadata = _read(state.folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in trainable.named_parameters().items():
            parameter.copy_(parameters[name])
    optimizer.load_state_dict(unflatten_state(tensors, metadata))
    return state.step


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        header = read_header(path)
        return read_tensors(header), header.metadata
    except UserError as error:
        found = "; ".join(f"{problem.where} {problem.what}" for problem in error.problems)
        what = f"cannot be read ({found}); delete its folder to resume from the one before"
        raise user_error(str(path), "training state", what) from None


def _require_same_names(folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if missing or extra or wrong:
        example = (missing or extra or wrong)[0]
        raise user_error(
            str(folder),
            "parameters",
            f"are those of another model or method: {len(missing)} missing, {len(extra)} unknown, "
            f"{len(wrong)} of another shape, for example {example}",
        )
