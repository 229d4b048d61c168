"""How far a long preparation has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sdtrain.training.watching.text import duration, say

LINE_EVERY_S = 10.0
"""Seconds between two lines where there is no terminal: under nohup, in a container or on a cluster."""


def waiting(console: Console, what: str) -> AbstractContextManager[object]:
    """Show on a terminal that something is under way of which nobody knows how long it takes; it vanishes after it."""
    return console.status(what, spinner="line") if console.is_terminal else nullcontext()


class ProgressLines:
    """Shows how many of how many things are done. Used as a context; what is shown on a terminal vanishes after it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._last_line = clock()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are through `what`."""
        if self._console.is_terminal:
            self._show_bar(what, done, total)
        else:
            self._show_line(what, done, total)

    def _show_bar(self, what: str, done: int, total: int) -> None:
        self._progress.start()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, visible=done < total)
        if done >= total:
            self._progress.stop()  # others may write until there is something to show again

    def _show_line(self, what: str, done: int, total: int) -> None:
        now = self._clock()
        started = self._started.setdefault(what, now)
        if now - self._last_line < LINE_EVERY_S or done >= total:
            return
        self._last_line = now
        left = duration((now - started) / done * (total - done))
        say(self._console, f"{what}: {done:,} of {total:,}, about {left} left")
