"""The index of a training state: what is in its folder, with sizes and digests, and whether that is still so. No torch.

Only a folder that is named `step-` and digits is a state; a user's copy, `step-000006.bak`, is left alone by everybody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.errors import UserError
from sdtrain.files.hashes import digest_of, file_digest
from sdtrain.files.header import explain, read_header

VERSION = 2
WITHOUT_DIGESTS = 1
"""The version of states of before: two files and their step, without digests."""
INDEX = "state.json"
PARAMETERS, OPTIMIZER = "parameters.safetensors", "optimizer.safetensors"
CONFIG, PICTURES = "config.toml", "pictures.json"
NAME = re.compile(r"step-(\d{6,18})")


class DamagedError(Exception):
    """A state is not what was written; the text says what is wrong with it."""


@dataclass(frozen=True)
class SavedState:
    """A training state on disk, taken after `step` steps, by what its index says."""

    folder: Path
    step: int
    version: int = VERSION
    loss_was_finite: bool = True
    """Whether the last step before it had a finite loss; if not, the training may have been lost already."""
    batch_size: int = 0
    accumulation: int = 0
    """How the pictures are dealt out to steps; 0 in states of before that was written down."""
    base: str = ""
    """The digest of the model that is trained; empty where it was not written down."""
    loss_scale: tuple[float, int] | None = None
    """The scale of the loss and the number of good steps with it, of a run that computes in float16."""

    @property
    def is_checked(self) -> bool:
        """Whether it has digests."""
        return self.version > WITHOUT_DIGESTS


def index_text(content: Mapping[str, Any]) -> str:
    """Return the text of an index, with a digest of its own."""
    return json.dumps({**content, "digest": digest_of(_canonical(content))})


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def state_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of everything under `folder` that has the name of a state, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    found = ((NAME.fullmatch(entry.name), entry) for entry in folder.iterdir() if entry.is_dir())
    return sorted((int(match[1]), entry) for match, entry in found if match)


def saved_states(folder: Path) -> list[SavedState]:
    """Return the states under a folder whose index can be read, oldest first; their files are not looked at."""
    states = []
    for step, entry in state_folders(folder):
        try:
            states.append(read_index(entry, step))
        except DamagedError:
            continue
    return states


def read_index(folder: Path, step: int) -> SavedState:
    """Return what the index of a state says. Raises DamagedError where it is missing or cannot be believed."""
    content = _index(folder)
    version = content.get("version")
    if content.get("step") != step:
        raise DamagedError(f"{INDEX} is that of step {content.get('step')}")
    if version == WITHOUT_DIGESTS and set(content) == {"version", "step"}:  # no other is one with flipped bits
        return SavedState(folder, step, WITHOUT_DIGESTS)
    if version != VERSION:
        raise DamagedError(f"{INDEX} is of version {version}, this sdtrain reads {WITHOUT_DIGESTS} and {VERSION}")
    scale = content.get("loss_scale")
    return SavedState(
        folder,
        step,
        loss_was_finite=content["loss_was_finite"],
        batch_size=content["batch_size"],
        accumulation=content["accumulation"],
        base=content["base"],
        loss_scale=(float(scale[0]), int(scale[1])) if scale else None,
    )


def _index(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / INDEX).read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{INDEX} is missing") from None
    except OSError as error:
        raise DamagedError(f"{INDEX} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{INDEX} is cut off or overwritten") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{INDEX} is cut off or overwritten")
    if content.get("version") == VERSION:
        digest = content.pop("digest", None)
        if digest != digest_of(_canonical(content)):
            raise DamagedError(f"{INDEX} is not what was written")
    return content


def require_whole(state: SavedState) -> None:
    """Compare every file of a state with its size and digest. Raises DamagedError, naming the first that differs.

    States without digests are looked at as far as that goes: whether the headers fit the lengths of the files, and
    whether the optimizer counts as many steps.
    """
    if not state.is_checked:
        _require_readable(state)
        return
    for name, facts in _index(state.folder)["files"].items():
        path = state.folder / name
        try:
            num_bytes = path.stat().st_size
            if num_bytes != facts["bytes"]:
                raise DamagedError(f"{name} has {num_bytes:,} bytes where {facts['bytes']:,} were written")
            if file_digest(path) != facts["digest"]:
                raise DamagedError(f"{name} is not what was written: bits have changed")
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror}") from None


def _require_readable(state: SavedState) -> None:
    for name in (PARAMETERS, OPTIMIZER):
        try:
            metadata = read_header(state.folder / name).metadata
        except UserError as error:
            raise DamagedError(f"{name}: {explain(error)}") from None
    try:
        steps = json.loads(metadata["prodigy_plus_schedule_free"])["steps"]
    except (KeyError, TypeError, ValueError):
        raise DamagedError(f"{OPTIMIZER} does not hold the state of the optimizer") from None
    if steps != state.step:
        raise DamagedError(f"{OPTIMIZER} is that of step {steps}")


def read_file(state: SavedState, name: str) -> bytes:
    """Return a small file of a state, checked. Raises DamagedError where it is not what was written."""
    facts = _index(state.folder).get("files", {}).get(name)
    try:
        content = (state.folder / name).read_bytes()
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
    if facts is None or digest_of(content) != facts["digest"]:
        raise DamagedError(f"{name} is not what was written")
    return content
