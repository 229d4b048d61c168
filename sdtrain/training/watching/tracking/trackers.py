"""The trackers that a run can write to: each begins, takes numbers and pictures, and ends. No torch.

Their packages are imported when a run begins, not before. Nothing here may raise into a training: whoever calls these
is a watcher, which is dropped when it fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, assert_never

from PIL import Image

from sdtrain.config.paths import read_toml
from sdtrain.config.schema import TrackerName, TrackingConfig
from sdtrain.errors import Problem
from sdtrain.training.watching.records import RunRecord

PACKAGES: dict[TrackerName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
"""The package that each tracker needs; the extra of sdtrain has the tracker's name."""


class Tracker(Protocol):
    """Where numbers and pictures of a run go."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers by name; all of them are finite."""

    def picture(self, step: int, path: Path) -> None:
        """Take a grid of previews."""

    def end(self) -> None:
        """Write out what waits."""


class TensorBoard:
    """Event files in the run's folder, under `tensorboard/`."""

    def __init__(self, run: RunRecord) -> None:
        from tensorboardX import SummaryWriter

        again = run.first_step + 1 if run.first_step else None  # steps that are done again replace those of before
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=again, flush_secs=20)
        if not run.first_step:
            self._writer.add_text("config", "```\n" + run.config_toml + "\n```", 0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """Take a grid of previews, at once: these are rare and looked at."""
        import numpy

        with Image.open(path) as picture:
            pixels = numpy.asarray(picture.convert("RGB"))
        self._writer.add_image("previews", pixels, step, dataformats="HWC")
        self._writer.flush()

    def end(self) -> None:
        """Write out what waits."""
        self._writer.close()


class LoggedRun:
    """A run of Weights & Biases, or of trackio, which has the same calls."""

    def __init__(self, module: Any, run: RunRecord, project: str, options: Mapping[str, Any]) -> None:
        self._module = module
        self._run = module.init(project=project, name=run.name, config=read_toml(run.config_toml), **options)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers by name; the step is one of them, for a run that goes on does steps again."""
        self._module.log({"step": step, **values})

    def picture(self, step: int, path: Path) -> None:
        """Take a grid of previews."""
        self._module.log({"step": step, "previews": self._module.Image(str(path), caption=f"step {step}")})

    def end(self) -> None:
        """Write out what waits."""
        self._module.finish()


def open_tracker(name: TrackerName, run: RunRecord, project: str) -> Tracker:
    """Begin a run of a tracker. Raises whatever its package raises."""
    match name:
        case "tensorboard":
            return TensorBoard(run)
        case "wandb":
            import wandb

            settings = wandb.Settings(console="off", silent=True)  # the terminal is the run's own
            return LoggedRun(wandb, run, project, {"dir": str(run.folder), "settings": settings})
        case "trackio":
            import trackio

            return LoggedRun(trackio, run, project, {"resume": "allow"})
        case _:
            assert_never(name)


def tracker_problems(config: TrackingConfig) -> list[Problem]:
    """Return a problem for each tracker whose package is not installed; nothing is imported to find out."""
    return [
        Problem(
            "tracking.to",
            f"{name} needs the package {PACKAGES[name]}, which is not installed; `pip install {PACKAGES[name]}`, or "
            f"take {name} out",
        )
        for name in dict.fromkeys(config.to)
        if find_spec(PACKAGES[name]) is None
    ]


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the numbers that are some and finite."""
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
