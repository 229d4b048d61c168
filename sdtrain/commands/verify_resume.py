"""`sdtrain verify-resume`: proves on this machine that a run which was interrupted equals one that was not."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.commands.fit import fit
from sdtrain.config.from_python import chosen_settings
from sdtrain.config.read import read_config, resolve
from sdtrain.config.schema import Config
from sdtrain.errors import user_error
from sdtrain.files.header import Header, read_header
from sdtrain.training.watching.records import Record, StepRecord
from sdtrain.training.watching.text import duration

FEWEST_STEPS = 2


@dataclass(frozen=True)
class Verdict:
    """What came of it."""

    steps: int
    num_losses: int
    num_tensors: int
    num_bytes: int
    seconds: float
    difference: str
    """Where the two runs first differ; empty where they are equal bit for bit."""
    straight_difference: str = ""
    """Where two straight runs first differ: then it is the machine, and not the resume."""

    @property
    def equal(self) -> bool:
        """Whether a run that was interrupted equals one that was not."""
        return not self.difference


@dataclass(frozen=True)
class Compared:
    """Two runs beside one another."""

    num_losses: int
    num_tensors: int
    num_bytes: int
    difference: str
    """Where they first differ; empty where they are equal bit for bit."""


def verify_resume(path: Path, overrides: Sequence[str], *, steps: int) -> Verdict:
    """Train `steps` steps straight, and as many with a stop and a resume between; return what a comparison found.

    Both runs are made in a temporary folder, which is removed; pictures and captions are encoded into the config's
    own cache. Raises UserError for what is wrong with the config.
    """
    if steps < FEWEST_STEPS:
        raise user_error("verify-resume", "--steps", f"found {steps}; {FEWEST_STEPS} at least are needed")
    started = time.monotonic()
    config = read_config(path, overrides)
    with tempfile.TemporaryDirectory(prefix="sdtrain-verify-") as folder:
        straight, resumed = (shortened(config, steps, Path(folder) / name) for name in ("straight", "resumed"))
        first = _train_straight(straight)
        found = compare_runs(first, _train_with_a_stop(resumed, steps // 2), steps)
        repeatable = ""
        if found.difference:
            again = _train_straight(shortened(config, steps, Path(folder) / "again"))
            repeatable = compare_runs(first, again, steps).difference
    numbers = found.num_losses, found.num_tensors, found.num_bytes
    return Verdict(steps, *numbers, time.monotonic() - started, found.difference, repeatable)


def verdict_lines(found: Verdict) -> list[str]:
    """Return the verdict as a person reads it: one line, or two where even straight runs differ."""
    half = found.steps // 2
    if found.equal:
        size = f"{found.num_tensors} tensors of {found.num_bytes / 2**20:.1f} MiB"
        return [
            f"equal bit for bit: {found.steps} steps straight and {half} + {found.steps - half} with a resume between "
            f"({found.num_losses} losses, {size}; {duration(found.seconds)})"
        ]
    lines = [f"NOT equal: {found.steps} steps straight and with a resume after {half}: {found.difference}"]
    if found.straight_difference:
        what = "two straight runs differ too, so this machine does not repeat its arithmetic; it is not the resume"
        lines.append(f"{what}: {found.straight_difference}")
    return lines


def shortened(config: Config, steps: int, output: Path) -> Config:
    """Return the config as a short run in another folder, which keeps its cache and draws no pictures.

    On a GPU it computes with kernels that repeat their bits, without which nothing could be compared.
    """
    table: dict[str, Any] = chosen_settings(config)
    cache = config.data.cache or str(Path(config.output) / "cache")
    table |= {"steps": steps, "output": str(output), "deterministic": True, "data": {**table["data"], "cache": cache}}
    table["preview"] = {**table.get("preview", {}), "every": 0}
    table["checkpoint"] = {**table.get("checkpoint", {}), "every": 0}
    freeze = config.optimizer.prodigy_steps
    if isinstance(freeze, int) and freeze > steps:
        table["optimizer"] = {**table["optimizer"], "prodigy_steps": steps}
    table["validation"] = {**table.get("validation", {}), "patience": 0}
    return resolve(table, "config")


def _train_straight(config: Config) -> Path:
    return fit(config).folder


def _train_with_a_stop(config: Config, step: int) -> Path:
    """Train to a step, stop there as Ctrl-C does, and go on from what was saved, with everything loaded anew."""
    fit(config, watchers=[_stop_at(step)])
    return fit(config, resume=True).folder


def _stop_at(step: int) -> Callable[[Record], None]:
    def watch(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == step:
            signal.raise_signal(signal.SIGINT)

    return watch


def compare_runs(one: Path, other: Path, steps: int) -> Compared:
    """Compare the losses, the last training state and the weights of two runs, in this order."""
    losses = [_losses(run) for run in (one, other)]
    num_tensors = num_bytes = 0
    difference = _first_loss(*losses)
    for files in zip(_files(one, steps), _files(other, steps), strict=True):
        headers = read_header(files[0]), read_header(files[1])
        num_tensors += len(headers[0].entries)
        num_bytes += sum(entry.end - entry.start for entry in headers[0].entries.values())
        difference = difference or _first_tensor(*headers)
    return Compared(len(losses[0]), num_tensors, num_bytes, difference)


def _files(run: Path, steps: int) -> Iterator[Path]:
    state = run / "checkpoints" / f"step-{steps:06d}"
    yield state / "parameters.safetensors"
    yield state / "optimizer.safetensors"
    yield next(path for path in (run / "weights").glob("*.safetensors") if path.stem == run.name)


def _losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def _first_loss(one: Sequence[tuple[int, float]], other: Sequence[tuple[int, float]]) -> str:
    if [step for step, _ in one] != [step for step, _ in other]:
        return f"the logs hold steps {[step for step, _ in one]} and {[step for step, _ in other]}"
    for (step, loss), (_, found) in zip(one, other, strict=True):
        if loss != found:
            return f"the loss of step {step} is {loss!r} straight and {found!r} resumed"
    return ""


def _first_tensor(one: Header, other: Header) -> str:
    place = f"{one.path.parent.name}/{one.path.name}"
    if list(one.entries) != list(other.entries):
        return f"{place} holds other tensors"
    with one.path.open("rb") as file, other.path.open("rb") as found:
        for name, entry in one.entries.items():
            file.seek(entry.start)
            found.seek(other.entries[name].start)
            size = entry.end - entry.start
            if (entry.dtype, entry.shape) != (other.entries[name].dtype, other.entries[name].shape) or (
                file.read(size) != found.read(size)
            ):
                return f"{place} differs first in {name}"
    return ""
