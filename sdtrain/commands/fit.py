"""`sdtrain fit`: read, refuse what cannot work, then train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sdtrain.commands.libraries import quiet_libraries
from sdtrain.config.schema import Config
from sdtrain.training.start import inspect_run, read_run_config, require_own_folder


def fit_config(path: Path, overrides: Sequence[str], console: Console, *, resume: bool) -> bool:
    """Train what a config file says; True when the planned steps are done. Raises UserError."""
    return fit_settings(read_run_config(path, overrides, resume=resume), str(path), console, resume=resume)


def fit_settings(config: Config, source: str, console: Console, *, resume: bool, fetch: bool = True) -> bool:
    """Train what settings say; True when the planned steps are done. Raises UserError.

    source: what the settings were read from, named in what the user is told. fetch: get a model that is named by a hub
    id and not in the local cache.
    """
    require_own_folder(config, resume=resume)
    opened, examples = inspect_run(config, source, decode=False, fetch=fetch)
    quiet_libraries()  # not before: fetching a model shows its progress
    from sdtrain.training.fit import fit  # what can be told without torch has been told

    return fit(config, opened, examples, console, resume=resume)
