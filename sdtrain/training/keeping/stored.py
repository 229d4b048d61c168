"""The settings of an earlier run: its config.toml, or where that is damaged the copy in its newest state. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdtrain.config.read import read_table
from sdtrain.errors import UserError
from sdtrain.training.keeping.manifest import CONFIG, DamagedError, read_file, saved_states


def settings_path(folder: Path) -> Path:
    """Return the file with the settings of the run in a folder: its config.toml, or the copy in its newest state.

    The copy is taken where the file is gone, cut off, or lacks a setting that the copy has: it may have been cut
    between two tables.
    """
    own, copy = folder / CONFIG, copy_of_settings(folder)
    if copy is None:
        return own
    try:
        return own if _settings(read_table(copy)) <= _settings(read_table(own)) else copy
    except UserError:
        return copy


def _settings(table: Mapping[str, Any], above: str = "") -> set[str]:
    """Return the names of all settings in a table. Those whose names a user chose, of ranks for one, do not count."""
    names = set()
    for key, value in table.items():
        names.add(above + key)
        if isinstance(value, Mapping) and not above:
            names |= _settings(value, f"{key}.")
    return names


def copy_of_settings(folder: Path) -> Path | None:
    """Return the newest whole copy of a run's settings in its training states, None where there is none."""
    for state in reversed(saved_states(folder / "checkpoints")):
        try:
            read_file(state, CONFIG)
        except DamagedError:
            continue
        return state.folder / CONFIG
    return None


def readable_config(path: Path, *, resume: bool) -> Path:
    """Return the config to read where `path` was given: of a run that goes on, if its own is damaged, a state's copy.

    Anything but the config.toml of a run with states is returned as it is, so that what is wrong with it is told.
    """
    if not resume or path.name != CONFIG or not (path.parent / "checkpoints").is_dir():
        return path
    return settings_path(path.parent)
