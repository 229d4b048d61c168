"""A long preparation is never silent: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from sdtrain.training.watching.progress import LINE_EVERY_S, ProgressLines


def shown(seconds_each: float, total: int, *, terminal: bool = False) -> str:
    text = io.StringIO()
    now = [0.0]
    console = Console(file=text, width=100, force_terminal=terminal)
    with ProgressLines(console, lambda: now[0]) as progress:
        for done in range(1, total + 1):
            now[0] += seconds_each
            progress.show("encoding pictures", done, total)
    return text.getvalue()


def test_without_a_terminal_a_line_comes_every_few_seconds_with_the_time_that_is_left() -> None:
    lines = shown(1.0, 100).splitlines()
    assert len(lines) == 100 / LINE_EVERY_S - 1
    assert lines[0] == "encoding pictures: 10 of 100, about 1 min 21 s left"
    assert lines[-1].startswith("encoding pictures: 90 of 100, about 10 s left")


def test_what_is_quick_says_nothing_without_a_terminal() -> None:
    assert shown(0.001, 100) == ""


def test_on_a_terminal_a_bar_is_shown_and_what_comes_after_stands_alone() -> None:
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True)
    with ProgressLines(console) as progress:
        for done in (1, 2):
            progress.show("reading pictures", done, 2)
        progress.show("encoding captions", 1, 3)
    assert "encoding captions" in text.getvalue() and "1/3" in text.getvalue()
