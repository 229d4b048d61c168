"""Reading the config of a run that begins or goes on; no torch, so that mistakes are told at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrain.config.read import differences, read_table, resolve
from sdtrain.config.schema import Config
from sdtrain.data.examples import Example, scan_folders
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.models.checkpoints.hub import fetch_if_missing
from sdtrain.models.checkpoints.inspect import OpenedModel, inspect_model

CHANGEABLE = ("steps", "output", "device", "preview.", "checkpoint.", "export.", "data.cache")
"""Settings a resumed run may change: none of them changes what a step computes."""


def read_run_config(path: Path, overrides: Sequence[str], *, resume: bool) -> Config:
    """The config of a run, in a file. Raises UserError with everything that is wrong with it."""
    return run_config(read_table(path, overrides), str(path), resume=resume)


def run_config(table: dict[str, Any], source: str, *, resume: bool) -> Config:
    """The config of a run, as the table of a file. Raises UserError, naming `source`."""
    if resume:
        table = keep_stored(table, stored_table(run_folder(str(table.get("output", "runs")), str(table.get("name")))))
    return resolve(table, source)


def run_folder(output: str, name: str) -> Path:
    """Where a run lies."""
    return Path(output).expanduser() / name


def stored_table(folder: Path) -> dict[str, Any]:
    """The resolved config of an earlier run as a plain table. Raises UserError when there is none."""
    path = folder / "config.toml"
    if not path.exists():
        raise user_error(str(folder), "run", "there is no run in this folder; start one with `sdtrain fit CONFIG`")
    return as_it_began(read_table(path))


def stored_config(folder: Path) -> Config:
    """The resolved config of an earlier run. Raises UserError when there is none."""
    return resolve(stored_table(folder), str(folder / "config.toml"))


def keep_stored(table: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The table with what the run resolved when it began, unless the user sets it now.

    A preset means numbers that follow from the planned steps; more steps later must not move what already happened.
    What no caption is must not change in the middle of a run either.
    """
    kept = dict(table)
    model = table.get("model", {})
    if isinstance(model, Mapping) and "no_caption" in stored["model"]:
        kept["model"] = {"no_caption": stored["model"]["no_caption"], **model}
    optimizer = table.get("optimizer", {})
    if isinstance(optimizer, Mapping) and optimizer.get("preset") in (None, stored["optimizer"]["preset"]):
        kept["optimizer"] = {**stored["optimizer"], **optimizer}
    return kept


def as_it_began(stored: dict[str, Any]) -> dict[str, Any]:
    """The table of a run that may be older than `model.no_caption`.

    Such a run trained dropped and missing captions as the encoded empty string, whatever the model said; it goes on so.
    """
    model, data = stored.get("model"), stored.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict) or "no_caption" in model:
        return stored
    empty = [folder.get("missing_captions") == "empty" for folder in data.get("folder", [])]
    if data.get("caption_dropout") or any(empty):
        model["no_caption"] = "empty-text"
    return stored


def require_own_folder(config: Config, *, resume: bool) -> None:
    """Refuse to mix a run with another that lies in its folder. Raises UserError."""
    folder = run_folder(config.output, config.name)
    if resume:
        _require_same(config, folder)
    elif (folder / "config.toml").exists():
        done = (folder / "weights" / f"{config.name}.safetensors").exists()
        what = "a finished run" if done else "a run that was not finished"
        longer = f"add --resume --set steps=N to train it beyond {stored_config(folder).steps} steps"
        more = longer if done else "add --resume to go on"
        raise user_error(str(folder), "name", f"holds {what}; {more}, or choose another `name` (--set name=...)")


def _require_same(config: Config, folder: Path) -> None:
    before = json.loads(stored_config(folder).model_dump_json())
    after = json.loads(config.model_dump_json())
    problems = [
        Problem(path, f"was {old!r} when this run began, is {new!r} now; change it back or start a run of another name")
        for path, old, new in differences(before, after)
        if not path.startswith(CHANGEABLE)
    ]
    if problems:
        raise UserError(f"--resume {folder}", problems)


def inspect_run(config: Config, source: str, *, decode: bool, fetch: bool = False) -> tuple[OpenedModel, list[Example]]:
    """The model, opened, and the pictures. Raises UserError with everything that is wrong.

    decode: read every pixel of every picture. fetch: get a model named by a hub id that is not in the local cache.
    """
    if fetch:
        fetch_if_missing(config.model)
    facts, problems = inspect_model(config.model)
    if facts is not None:
        problems = [*problems, *size_problems(config, facts), *_network_problems(config, facts)]
    examples, data_problems = scan_folders(config.data, decode=decode)
    problems = [*problems, *data_problems]
    if problems or facts is None:
        raise UserError(source, problems)
    return facts, examples


def _network_problems(config: Config, facts: OpenedModel) -> list[Problem]:
    return [
        Problem("method.train", f"names {network}, which {facts.family.title} does not have")
        for network in config.method.train
        if network not in facts.family.components
    ]


def size_problems(config: Config, facts: OpenedModel) -> list[Problem]:
    """Picture sizes that the model's halvings do not fit."""
    step = facts.latent_step_px
    sizes = {
        "data.bucket_step_px": config.data.bucket_step_px,
        "preview.width_px": config.preview.width_px or config.data.resolution_px,
        "preview.height_px": config.preview.height_px or config.data.resolution_px,
    }
    return [
        Problem(where, f"{size} is not a multiple of {step}, which this model needs")
        for where, size in sizes.items()
        if size % step
    ]
