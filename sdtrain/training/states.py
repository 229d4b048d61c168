"""Training states: whole or not there at all. They hold y and z; exported weights hold x."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree, flatten_state, unflatten_state
from sdtrain.errors import user_error
from sdtrain.training.parameters import Trainable

VERSION = 1


@dataclass(frozen=True)
class SavedState:
    """A complete training state on disk, taken after `step` steps."""

    folder: Path
    step: int


def save_state(folder: Path, step: int, trainable: Trainable, optimizer: ProdigyPlusScheduleFree, keep: int) -> Path:
    """Write the state after `step` steps under `folder`, then drop all but the newest `keep`. Returns its folder.

    It is written beside and renamed when it is complete, so that a kill at any moment leaves whole states only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, partial = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    if target.exists():
        return target  # a step has one state: it was saved a moment ago
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    parameters = {name: value.detach().contiguous() for name, value in trainable.named_parameters().items()}
    tensors, metadata = flatten_state(optimizer.state_dict())
    save_file(parameters, partial / "parameters.safetensors")
    save_file(tensors, partial / "optimizer.safetensors", metadata=metadata)
    (partial / "state.json").write_text(json.dumps({"version": VERSION, "step": step}), encoding="utf-8")
    for path in partial.iterdir():
        _flush(path)
    partial.rename(target)
    _flush(folder)
    for old in saved_states(folder)[:-keep]:
        shutil.rmtree(old.folder)
    return target


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def saved_states(folder: Path) -> list[SavedState]:
    """The complete states under a folder, oldest first."""
    found = []
    for entry in folder.glob("step-*"):
        if (entry / "state.json").exists():
            found.append(SavedState(entry, int(entry.name.removeprefix("step-"))))
    return sorted(found, key=lambda state: state.step)


def load_state(state: SavedState, trainable: Trainable, optimizer: ProdigyPlusScheduleFree) -> int:
    """Put a saved state back, bit for bit; returns its step. Raises UserError if it is damaged or not ours."""
    version = json.loads((state.folder / "state.json").read_text(encoding="utf-8"))["version"]
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
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise user_error(
            str(path), "training state", f"cannot be read ({error}); delete its folder to resume from the one before"
        ) from None


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
