"""What stands in a terminal while a run trains, as a terminal shows it: kept in `screens/`, one file a screen.

A screen that is to change: delete its file, run this test, and look at the new one.
"""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sdtrain.training.watching.records import GroupRecord, NoteRecord, PictureRecord, RunRecord, StepRecord
from sdtrain.training.watching.screen import Screen
from sdtrain.training.watching.terminal import Ascii

KEPT = Path(__file__).parent / "screens"
ONE, THREE = ("unet",), ("unet", "text_encoder", "text_encoder_2")
RUN = RunRecord("x", Path("runs/x"), 700, 0, 1e-4, "")
NOTE = (
    "note: d of unet was still climbing when optimizer.prodigy_steps froze it at 1.0e-05, so it learns too slowly; "
    "leave prodigy_steps to the preset, which freezes d at rest (`--resume --set optimizer.prodigy_steps=auto`)."
)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def step(number: int, names: tuple[str, ...], **more: Any) -> StepRecord:
    rate = {"d": 1e-4, "applied_d": 1e-4, "effective_lr": 1e-4, "frozen": False, "start_d": 1e-4}
    groups = tuple(GroupRecord(name=name, **rate) for name in names)  # type: ignore[arg-type]
    record = StepRecord(number, 0.1234, 4, 12.34, groups, peak_memory_gib=10.53)
    return dataclasses.replace(record, **more)


class Terminal(io.StringIO):
    """A file that a terminal of some width reads."""

    def __init__(self, columns: int, rows: int = 12) -> None:
        super().__init__()
        pyte = pytest.importorskip("pyte", reason="pip install pyte, of the extra `dev`")
        self.screen = pyte.Screen(columns, rows)
        self.screen.set_mode(20)  # as the driver of a terminal does: a line feed returns to the left
        self.stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self.stream.feed(text)
        return len(text)

    def shown(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip() + "\n"


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("names", [ONE, THREE], ids=["one", "three"])
def test_the_screen_is_the_one_that_is_kept(columns: int, names: tuple[str, ...]) -> None:
    clock, terminal = Clock(), Terminal(columns)
    with Screen(Console(file=terminal, width=columns, height=12, force_terminal=True), RUN, clock) as screen:
        for number in range(1, 138):
            clock.seconds = 5.0 * number
            screen.see(step(number, names))
            if number == 100:
                screen.see(PictureRecord(100, Path("runs/x/previews/step-000100.png")))
        screen.see(NoteRecord(137, NOTE))
        shown = terminal.shown()
    assert terminal.shown() == shown, "what stands there when it ends is what stood there last"
    kept = KEPT / f"{len(names)}-networks-{columns}-columns.txt"
    if not kept.exists():
        kept.write_text(shown, encoding="utf-8")
        pytest.fail(f"{kept} was not there: look at it, and keep it")
    assert shown == kept.read_text(encoding="utf-8")


WIDTHS = st.sampled_from([60, 80, 120])


@given(
    columns=WIDTHS,
    names=st.sampled_from([ONE, THREE]),
    steps=st.integers(1, 1_000_000),
    share=st.floats(0, 1),
    seconds=st.floats(0, 1e6),
    loss=st.floats(0, 99),
    pace=st.floats(0.001, 999),
    memory=st.none() | st.floats(0, 300),
)
def test_step_time_loss_and_rates_are_never_lost(
    columns: int,
    names: tuple[str, ...],
    steps: int,
    share: float,
    seconds: float,
    loss: float,
    pace: float,
    memory: float | None,
) -> None:
    clock, number = Clock(), max(1, round(share * steps))
    screen = Screen(Console(file=io.StringIO(), width=columns), dataclasses.replace(RUN, steps=steps), clock)
    clock.seconds = seconds
    screen.see(step(number, names, loss=loss, images_per_s=pace, peak_memory_gib=memory))
    out = io.StringIO()
    Console(file=out, width=columns).print(screen)
    upper, lower = out.getvalue().splitlines()
    assert max(len(upper), len(lower)) <= columns
    assert re.fullmatch(rf"step {number}/{steps}  .*left \d+:\d\d:\d\d  \S+ (img|images)/s.*", upper), upper
    assert re.fullmatch(rf"loss {loss:.4f}  (effective_)?lr unet 1.0e-04.*", lower), lower
    assert lower.count("1.0e-04") == len(names)
    if memory is not None and columns >= 80:
        assert upper.endswith(f"peak {memory:.1f} GiB"), upper


def test_before_the_first_step_nothing_is_made_up() -> None:
    out = io.StringIO()
    Console(file=out, width=60).print(Screen(Console(file=io.StringIO()), RUN, Clock()))
    upper, lower = out.getvalue().splitlines()
    assert upper.startswith("step 0/700  ") and "left -:--:--" in upper
    assert lower == "the first step is on its way"


def test_plain_lines_are_ascii_and_tell_the_memory_too() -> None:
    out = io.StringIO()
    with Screen(Console(file=Ascii(out), force_terminal=False, no_color=True), RUN, Clock()) as screen:  # type: ignore[arg-type]
        for number in range(1, 701):
            screen.see(step(number, ONE, images_per_s=0.0123))
        screen.see(NoteRecord(700, "größer ± 絵"))
    lines = out.getvalue().splitlines()
    assert len(lines) == 21
    assert lines[0] == "step 35/700  0 s left  loss 0.1234  0.012 images/s  effective_lr unet 1.0e-04  peak 10.5 GiB"
    assert lines[-1] == "gr\\xf6\\xdfer +- \\u7d75"
    out = io.StringIO()
    Console(file=Ascii(out), width=120).print(screen)  # type: ignore[arg-type]
    assert out.getvalue().isascii() and "#" in out.getvalue()
