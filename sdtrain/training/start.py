"""Reading the config of a run that begins or goes on; no torch, so that mistakes are told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrain.config.read import read_table, resolve
from sdtrain.config.schema import Config
from sdtrain.errors import user_error


def read_run_config(path: Path, overrides: Sequence[str], *, resume: bool) -> Config:
    """The config of a run. Raises UserError with everything that is wrong with it."""
    table = read_table(path, overrides)
    if resume:
        table = keep_stored_optimizer(table, stored_table(run_folder(table)))
    return resolve(table, str(path))


def run_folder(table: Mapping[str, Any]) -> Path:
    """Where the run of a plain config table lies."""
    return Path(str(table.get("output", "runs"))).expanduser() / str(table.get("name", ""))


def stored_table(folder: Path) -> dict[str, Any]:
    """The resolved config of an earlier run as a plain table. Raises UserError when there is none."""
    path = folder / "config.toml"
    if not path.exists():
        raise user_error(str(folder), "run", "there is no run in this folder; start one with `sdtrain fit CONFIG`")
    return read_table(path)


def stored_config(folder: Path) -> Config:
    """The resolved config of an earlier run. Raises UserError when there is none."""
    return resolve(stored_table(folder), str(folder / "config.toml"))


def keep_stored_optimizer(table: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the optimizer values the run resolved when it began, unless the user sets them now.

    A preset means numbers that follow from the planned steps; more steps later must not move what already happened.
    """
    optimizer = table.get("optimizer", {})
    if not isinstance(optimizer, Mapping) or optimizer.get("preset") not in (None, stored["optimizer"]["preset"]):
        return dict(table)
    return {**table, "optimizer": {**stored["optimizer"], **optimizer}}
