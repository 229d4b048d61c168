"""Shows a run in the terminal: a progress bar, or plain lines where nothing can be redrawn."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self, assert_never

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from sdtrain.training.watching.records import (
    EndRecord,
    NoteRecord,
    PictureRecord,
    Record,
    RunRecord,
    SavedRecord,
    StepRecord,
    ValidationRecord,
)
from sdtrain.training.watching.text import duration, say

SMOOTHING = 0.98
"""The share of the smoothed loss that stays at each step: it looks back about 50 steps."""
PLAIN_LINES = 20
"""The most lines of progress that a whole run prints where nothing can be redrawn, not counting the last one."""


class Screen:
    """Shows records on a console. It is a context manager around the progress display; its `see` is the watcher."""

    def __init__(self, console: Console, run: RunRecord) -> None:
        self._console = console
        self._run = run
        self._smoothed = 0.0
        self._weight = 0.0
        self._started = time.monotonic()
        self._bar = _bar(console)
        self._task = self._bar.add_task("", total=run.steps, completed=run.first_step)
        self._numbers = Text()
        self._live = Live(Group(self._bar, self._numbers), console=console)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def see(self, record: Record) -> None:
        """Show a record where it tells a person something."""
        match record:
            case StepRecord():
                self._step(record)
            case PictureRecord():
                self._say(f"step {record.step}: preview {record.path}")
            case ValidationRecord():
                self._say(validation_line(record))
            case NoteRecord():
                self._say(record.text)
            case RunRecord() | SavedRecord() | EndRecord():
                pass  # the banner, the summary and the farewell tell these
            case _:
                assert_never(record)

    def _say(self, text: str) -> None:
        """Print one line above the progress display."""
        say(self._console, text)

    def _step(self, record: StepRecord) -> None:
        if math.isfinite(record.loss):  # any other would stay in the mean for ever
            self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * record.loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        smoothed = self._smoothed / self._weight if self._weight else float("nan")
        rates = "  ".join(
            f"{group.name} {'stopped' if group.stopped else f'{group.effective_lr:.1e}'}" for group in record.groups
        )
        text = f"loss {smoothed:.4f}  {record.images_per_s:.1f} images/s  effective_lr {rates}"
        step, steps = record.step, self._run.steps
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step)
            self._numbers.plain = text
        elif step == steps or step % math.ceil(steps / PLAIN_LINES) == 0:
            self._say(f"step {step}/{steps}  {self._left(step)} left  {text}")

    def _left(self, step: int) -> str:
        done = max(1, step - self._run.first_step)
        return duration((time.monotonic() - self._started) / done * (self._run.steps - step))


def validation_line(record: ValidationRecord) -> str:
    """Return a validation as one line: the loss, how sure it is, and how it stands to the best."""
    best = ""
    if record.best_step == record.step:
        best = ", the best so far"
    elif record.best_step is not None:
        best = f"; best {record.best_loss:.5f} at step {record.best_step}"
    loss = f"{record.loss:.5f} ± {record.standard_error:.5f}"
    return f"step {record.step}: held-out loss {loss} over {record.num_pictures} pictures{best}"


def _bar(console: Console) -> Progress:
    """Return the upper line of the display.

    The numbers have a line of their own, for a narrow terminal would cut the time that is left.
    """
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )
