"""The settings of an earlier run: its config.toml, or where that is damaged the copy in its newest state. No torch."""

from __future__ import annotations

from pathlib import Path

from sdtrain.config.read import read_table
from sdtrain.errors import UserError
from sdtrain.training.keeping.manifest import CONFIG, DamagedError, read_file, saved_states


def settings_path(folder: Path) -> Path:
    """Return the file with the settings of the run in a folder; `folder/config.toml` where there is none to be read."""
    own = folder / CONFIG
    try:
        read_table(own)
    except UserError:
        return copy_of_settings(folder) or own
    return own


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
