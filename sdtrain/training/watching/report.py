"""What a run says: a progress line, a banner, a summary, and log.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from optim import GroupMetrics
from sdtrain.files.writer import write_text
from sdtrain.training.watching.text import duration

SMOOTHING = 0.98
"""Memory of the smoothed loss: about the last 50 steps."""
PLAIN_LINES = 20
"""Lines of progress a whole run prints where there is no terminal to redraw."""
STUCK_STEPS = 100
"""After so many steps with d at d0 the user is told."""


class Report:
    """The voice of a run, from its first line to its last; a context manager around the progress display."""

    def __init__(self, console: Console, folder: Path, *, num_steps: int, first_step: int, d0: float) -> None:
        self._console = console
        self._log_path = folder / "log.jsonl"
        self._num_steps = num_steps
        self._first_step = first_step
        self._d0 = d0
        self._smoothed = 0.0
        self._weight = 0.0
        self._started = time.monotonic()
        self._step_started = self._started
        self._seconds_per_image = 0.0
        self._told_stuck = False
        self._log: IO[str] | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        _drop_records_after(self._log_path, self._first_step)
        self._log = self._log_path.open("a", encoding="utf-8")
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                expand=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=self._num_steps, completed=self._first_step)
        self._started = time.monotonic()
        return self

    def begin_step(self) -> None:
        """Called before a step's work, so that previews and saves between steps do not count as training."""
        self._step_started = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._log is not None:
            self._log.close()

    def step(self, step: int, loss: float, num_images: int, groups: Sequence[GroupMetrics]) -> None:
        """Record that `step` steps are done, the last with this mean loss over so many images."""
        rate = self._images_per_second(num_images)
        if loss == loss:  # a loss that is not a number is not averaged
            self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self._write_record(step, loss, rate, groups)
        self._show(step, rate, groups)
        self._watch_d(step, groups)

    def _images_per_second(self, num_images: int) -> float:
        seconds = max(1e-9, time.monotonic() - self._step_started) / max(1, num_images)
        first = self._seconds_per_image == 0.0
        self._seconds_per_image = seconds if first else 0.9 * self._seconds_per_image + 0.1 * seconds
        return 1 / self._seconds_per_image

    def say(self, text: str) -> None:
        """One line above the progress display."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _write_record(self, step: int, loss: float, rate: float, groups: Sequence[GroupMetrics]) -> None:
        assert self._log is not None
        record = {
            "step": step,
            "loss": loss if loss == loss and abs(loss) != float("inf") else None,
            "images_per_s": round(rate, 3),
            "groups": {
                group.name: {
                    "d": group.d,
                    "applied_d": group.applied_d,
                    "effective_lr": group.effective_lr,
                    "frozen": group.frozen,
                }
                for group in groups
            },
        }
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()

    def _show(self, step: int, rate: float, groups: Sequence[GroupMetrics]) -> None:
        rates = "  ".join(f"{group.name} {group.effective_lr:.1e}" for group in groups)
        smoothed = self._smoothed / self._weight if self._weight else float("nan")
        text = f"loss {smoothed:.4f}  {rate:.1f} images/s  effective_lr {rates}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif step == self._num_steps or step % max(1, self._num_steps // PLAIN_LINES) == 0:
            self.say(f"step {step}/{self._num_steps}  {self._left(step)} left  {text}")

    def _left(self, step: int) -> str:
        done = max(1, step - self._first_step)
        return duration((time.monotonic() - self._started) / done * (self._num_steps - step))

    def _watch_d(self, step: int, groups: Sequence[GroupMetrics]) -> None:
        if self._told_stuck or step < self._first_step + STUCK_STEPS:
            return
        stuck = [group.name for group in groups if group.d <= self._d0 * (1 + 1e-6) and not group.frozen]
        if stuck and step >= STUCK_STEPS:
            self._told_stuck = True
            self.say(
                f"note: after {step} steps d of {', '.join(stuck)} is still d0 = {self._d0:.0e}, so it learns next to "
                "nothing. Likely: captions that do not fit the pictures, d0 too small for so few steps (try "
                "optimizer.d0 = 1e-5), or gradients that cancel in a very small batch."
            )


def _drop_records_after(path: Path, step: int) -> None:
    """A resumed run goes on from its last training state; what was logged beyond it is done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the line that was being written when the run was killed
    write_text(path, "".join(kept))
