"""What a plan cannot know: how long a step takes here. A few are made, and nothing of them stays but the cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from sdtrain.config.schema import Config
from sdtrain.data.examples import Example
from sdtrain.errors import Interrupted
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.ending.signals import StopRequests
from sdtrain.training.fit import prepare, train
from sdtrain.training.keeping.standing import cache_folder, find_standing
from sdtrain.training.ranks.group import ALONE
from sdtrain.training.run import pick_device
from sdtrain.training.watching.records import Record, StepRecord
from sdtrain.training.watching.text import duration
from sdtrain.training.watching.watchers import Watchers

WARMING_UP, COUNTED = 3, 10
"""Steps before the clock starts, in which kernels are chosen and memory is taken, and those it runs for."""


@dataclass(frozen=True)
class Measured:
    """device: what it was measured on. step_s: the median seconds of a step. peak_gib: the most memory in use, of a
    card by tensors; None where that is not known."""

    device: str
    step_s: float
    peak_gib: float | None

    def rows(self, steps: int) -> dict[str, str]:
        """Return what a person reads of it, for a run of so many steps."""
        told = f"{self.step_s:.3g} s on this {self.device}, the median of {COUNTED}"
        rows = {"measured": f"{told}; {steps} steps take about {duration(steps * self.step_s)}"}
        if self.peak_gib is not None:
            what = "by tensors, at most" if self.device == "cuda" else "by the whole process, at most"
            rows["memory"] = f"{self.peak_gib:.2f} GiB {what}"
        return rows


def measure_steps(
    config: Config, opened: OpenedModel, examples: Sequence[Example], console: Console, stop: StopRequests
) -> Measured:
    """Encode what the cache lacks, as the run will, and make the run's first steps in a folder that is removed again.

    Raises UserError as the run would, and Interrupted.
    """
    cache = cache_folder(config)
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix="measure-") as folder:
        alone = _without_looking(config, Path(folder), cache)
        standing = find_standing(alone, Path(folder) / alone.name, opened, examples, resume=False)
        training = prepare(alone, opened, standing, console, stop, ALONE)
        ends: list[float] = []
        peak: float | None = None

        def watch(record: Record) -> None:
            nonlocal peak
            if isinstance(record, StepRecord):
                ends.append(time.perf_counter())
                peak = record.peak_memory_gib
                if len(ends) == WARMING_UP + COUNTED:
                    stop.ask()

        try:
            train(training, Watchers(None, [watch]), stop)
        finally:
            training.data.close()
    if len(ends) < WARMING_UP + COUNTED:
        raise Interrupted(stop.number)
    seconds = [later - earlier for earlier, later in pairwise(ends[WARMING_UP - 1 : WARMING_UP + COUNTED])]
    return Measured(pick_device(config).type, statistics.median(seconds), peak)


def _without_looking(config: Config, folder: Path, cache: Path) -> Config:
    """Return the run's settings, with more steps than will be made and nothing between them."""
    return config.model_copy(
        update={
            "output": str(folder),
            "steps": max(config.steps, WARMING_UP + COUNTED + 2),
            "data": config.data.model_copy(update={"cache": str(cache)}),
            "preview": config.preview.model_copy(update={"every": 0}),
            "checkpoint": config.checkpoint.model_copy(update={"every": 0}),
            "validation": config.validation.model_copy(update={"every": 0}),
            "export": config.export.model_copy(update={"every": 0}),
        }
    )
