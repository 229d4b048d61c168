"""What can be told of a run from its folder alone, whatever state it is in; no torch."""

from __future__ import annotations

import json
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from sdtrain.config.schema import Config
from sdtrain.errors import UserError
from sdtrain.families.metadata import steps_of
from sdtrain.files.header import explain, read_header
from sdtrain.files.numbers import is_number
from sdtrain.training.ending.one_process import holder_of
from sdtrain.training.keeping.manifest import INDEX
from sdtrain.training.start import stored_config
from sdtrain.training.watching.log import log_lines
from sdtrain.training.watching.text import shell_word
from sdtrain.training.weights_files import weights_files

Standing = Literal["running", "stopped", "finished", "damaged"]
LAST_LOSSES = 50
"""How many of the last steps the loss is a mean of: the loss of one step says little."""


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder says."""

    folder: Path
    standing: Standing
    damage: str
    """What is wrong with it; empty where nothing is."""
    config: Config | None
    """None where it cannot be read."""
    states: tuple[int, ...]
    """The steps of the training states, oldest first."""
    last: Logged
    num_bytes: int
    holder: str = ""
    """Which process trains it now; empty where none does."""

    @property
    def step(self) -> int:
        """The steps that are done: those of the newest state, or of the log while it is trained."""
        return max(self.last.step, *self.states, 0) if self.standing == "running" else max((*self.states, 0))

    def go_on(self) -> str:
        """Return the command that goes on with it, or what to do before."""
        config = shell_word(self.folder / "config.toml")
        match self.standing:
            case "running":
                return f"it is being trained now by {self.holder}"
            case "stopped":
                return f"sdtrain fit {config} --resume"
            case "finished":
                steps = self.config.steps if self.config else 0
                return f"sdtrain fit {config} --resume --set steps={2 * max(steps, self.step)}"
            case "damaged":
                return self.damage


@dataclass(frozen=True)
class Logged:
    """What the log ends with."""

    step: int = 0
    loss: float | None = None
    """The mean of the last losses that are finite."""
    d: tuple[tuple[str, float], ...] = ()
    """The last d of each network."""
    best: tuple[int, float] | None = None
    """Step and loss of the best validation."""


def is_run(folder: Path) -> bool:
    """Return whether a folder looks like that of a run, be it damaged."""
    if (folder / INDEX).exists():  # it is one of a run's training states
        return False
    return any((folder / name).exists() for name in ("config.toml", "log.jsonl", "checkpoints"))


def facts_of(folder: Path) -> RunFacts:
    """Return what a run's folder says. Never fails: what cannot be read is told in `damage`."""
    config, damage = None, ""
    try:
        config = stored_config(folder)
    except UserError as error:
        damage = f"config.toml: {explain(error)}"
    states = state_steps(folder)
    damage = damage or _state_damage(folder, states)
    standing: Standing = "stopped"
    holder = holder_of(folder)
    if holder:
        standing = "running"
    elif damage:
        standing = "damaged"
    elif config is not None and _weights_of(folder, config, states):
        standing = "finished"
    return RunFacts(
        folder, standing, damage, config, states, read_log(folder / "log.jsonl"), disk_bytes(folder), holder
    )


def state_steps(folder: Path) -> tuple[int, ...]:
    """Return the steps of the training states in a run's folder, oldest first."""
    found = [re.fullmatch(r"step-(\d{1,12})", entry.name) for entry in folder.glob("checkpoints/step-*")]
    return tuple(sorted(int(match[1]) for match in found if match))


def _state_damage(folder: Path, steps: tuple[int, ...]) -> str:
    """Return what is wrong with the newest state, by its index and the headers of its files."""
    if not steps:
        return ""
    state = folder / "checkpoints" / f"step-{steps[-1]:06d}"
    try:
        index = json.loads((state / INDEX).read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError("it is no table")
        for name in ("parameters.safetensors", "optimizer.safetensors"):
            read_header(state / name)
    except UserError as error:
        what = explain(error)
    except (OSError, ValueError, RecursionError) as error:
        what = f"{state / INDEX} cannot be read ({error})"
    else:
        return ""
    before = "`--resume` goes on from the state before" if len(steps) > 1 else "there is no other state"
    return f"{what}; {before}"


def finished_weights(folder: Path) -> Path | None:
    """Return the weights file of a run that is finished, None for one that is not. Raises UserError for no run.

    Where the adapters as they were trained stand beside another form of them, it is theirs.
    """
    config = stored_config(folder)
    path = _weights_of(folder, config, state_steps(folder))
    if path is None:
        return None
    return next((exact for file in weights_files(config) if (exact := file.at(path)).is_file()), path)


def _weights_of(folder: Path, config: Config, states: tuple[int, ...]) -> Path | None:
    """Return the file that a finished run leaves, if it is there and as new as the newest state."""
    path = folder / "weights" / f"{config.name}.safetensors"
    try:
        weights = read_header(path)
    except UserError:
        return None
    return path if steps_of(weights.metadata) >= max((*states, 1)) else None


def read_log(path: Path, until: int | None = None) -> Logged:
    """Return what a log ends with, or what it said after `until` steps.

    Lines that cannot be read, such as one that a kill cut off, are passed over.
    """
    step, losses, d = 0, deque[float](maxlen=LAST_LOSSES), list[tuple[str, float]]()
    best: tuple[int, float] | None = None
    for line in log_lines(path):
        number, loss = line["step"], line.get("loss")
        if until is not None and number > until:
            continue
        step = max(step, number)
        if is_number(loss):
            losses.append(loss)
        groups = line.get("groups")
        if isinstance(groups, dict):
            values = {str(name): group.get("d") for name, group in groups.items() if isinstance(group, dict)}
            d = [(name, float(value)) for name, value in values.items() if is_number(value)]
        validation = line.get("validation")
        if number > 0 and isinstance(validation, dict) and is_number(validation.get("loss")):
            loss = float(validation["loss"])
            best = (number, loss) if best is None or loss < best[1] else best
    return Logged(step, fmean(losses) if losses else None, tuple(d), best)


def disk_bytes(folder: Path) -> int:
    """Return how many bytes the files in a folder have; links are not followed, and what vanishes meanwhile is 0."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.lstat().st_size
        except OSError:
            continue
    return total


def size_text(num_bytes: int) -> str:
    """Return a size as a person says it: 3.2 MiB, 1.4 GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
