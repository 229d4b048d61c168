"""Shows a run in the terminal: two lines that are drawn anew, or plain lines where nothing can be redrawn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, assert_never

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from sdtrain.training.watching.records import (
    EndRecord,
    GroupRecord,
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
GAP = "  "
LEAST_BAR = 8
"""A shorter bar tells nothing, and leaves its place to numbers."""


class Screen:
    """Shows records on a console. It is a context manager around the display; its `see` is the watcher."""

    def __init__(self, console: Console, run: RunRecord, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._run = run
        self._clock = clock
        self._smoothed = 0.0
        self._weight = 0.0
        self._started = clock()
        self._record: StepRecord | None = None
        self._live = Live(self, console=console)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        self._started = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the display: step, time and pace, then loss and rates; nothing of it is lost at 60 columns or more."""
        yield from self._display(options.max_width, ascii_only=options.ascii_only)

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
        """Print one line above the display."""
        say(self._console, text)

    def _step(self, record: StepRecord) -> None:
        if math.isfinite(record.loss):  # any other would stay in the mean for ever
            self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * record.loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self._record = record
        step, steps = record.step, self._run.steps
        if not self._console.is_terminal and (step == steps or step % math.ceil(steps / PLAIN_LINES) == 0):
            rates = GAP.join(_rates(record.groups))
            texts = [f"step {step}/{steps}", f"{duration(self._left_s(step))} left", self._loss()]
            texts += [f"{_pace(record)} images/s", f"effective_lr {rates}", *_memory(record)]
            self._say(GAP.join(texts))

    def _left_s(self, step: int) -> float:
        done = max(1, step - self._run.first_step)
        return (self._clock() - self._started) / done * (self._run.steps - step)

    def _loss(self) -> str:
        return f"loss {self._smoothed / self._weight if self._weight else float('nan'):.4f}"

    def _display(self, width: int, *, ascii_only: bool) -> Iterator[Text]:
        record, steps = self._record, self._run.steps
        step = record.step if record else self._run.first_step
        place, spent = f"step {step}/{steps}", _clock(self._clock() - self._started)
        left = f"left {_clock(self._left_s(step)) if record else '-:--:--'}"
        pace = _pace(record) if record else "-"
        memory = _memory(record) if record else []
        narrower = [
            [spent, left, f"{pace} images/s", *memory],
            [spent, left, f"{pace} img/s", *memory],
            [left, f"{pace} img/s", *memory],
            [left, f"{pace} img/s"],
            [left],
        ]
        behind = _first_that_fits(narrower, width - len(place + GAP))
        room = width - len(place + GAP + behind + GAP)
        upper = _line(place + GAP)
        if room >= LEAST_BAR:
            upper.append_text(_bar(step / steps, room, ascii_only=ascii_only)).append(GAP)
        yield upper.append(behind)
        if record:
            yield _line(self._loss() + GAP + _rates_that_fit(record.groups, width - len(self._loss() + GAP)))
        else:
            yield _line("the first step is on its way")


def validation_line(record: ValidationRecord) -> str:
    """Return a validation as one line: the loss, how sure it is, and how it stands to the best."""
    best = ""
    if record.best_step == record.step:
        best = ", the best so far"
    elif record.best_step is not None:
        best = f"; best {record.best_loss:.5f} at step {record.best_step}"
    loss = f"{record.loss:.5f} ± {record.standard_error:.5f}"
    return f"step {record.step}: held-out loss {loss} over {record.num_pictures} pictures{best}"


def _rates(groups: Sequence[GroupRecord], *, short: bool = False) -> list[str]:
    """Return how far each network moves in a step. short: by names such as `te2`, as in sd-scripts."""
    names = [group.name for group in groups]
    if short:
        names = [name.replace("text_encoder_", "te").replace("text_encoder", "te1") for name in names]
    rates = ["stopped" if group.stopped else f"{group.effective_lr:.1e}" for group in groups]
    return [f"{name} {rate}" for name, rate in zip(names, rates, strict=True)]


def _rates_that_fit(groups: Sequence[GroupRecord], width: int) -> str:
    long, short = _rates(groups), _rates(groups, short=True)
    choices = [
        [f"effective_lr {long[0]}", *long[1:]],
        [f"lr {long[0]}", *long[1:]],
        [f"lr {short[0]}", *short[1:]],
        [short[0]],
    ]
    return _first_that_fits(choices, width)


def _first_that_fits(choices: Sequence[Sequence[str]], width: int) -> str:
    """Return the first of some texts that fits, each put together of parts; the last where none does."""
    texts = [GAP.join(parts) for parts in choices]
    return next((text for text in texts if len(text) <= width), texts[-1])


def _pace(record: StepRecord) -> str:
    """Return the images per second, which may be far below one."""
    return f"{record.images_per_s:.1f}" if record.images_per_s >= 1 else f"{record.images_per_s:.2g}"


def _memory(record: StepRecord) -> list[str]:
    return [] if record.peak_memory_gib is None else [f"peak {record.peak_memory_gib:.1f} GiB"]


def _clock(seconds: float) -> str:
    """Return seconds as a clock shows them: 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _bar(share: float, width: int, *, ascii_only: bool) -> Text:
    done, rest = ("#", "-") if ascii_only else ("━", "╌")
    filled = round(min(1.0, max(0.0, share)) * width)
    return Text(done * filled, "bar.complete").append(rest * (width - filled), "bar.back")


def _line(text: str) -> Text:
    """Return one line of the display, which is cut rather than folded."""
    return Text(text, no_wrap=True, overflow="crop", end="\n")
