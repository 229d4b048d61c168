"""A long preparation is never silent: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from sdtrain.config.read import resolve
from sdtrain.config.schema import Config
from sdtrain.training.watching.progress import LINE_EVERY_S, ProgressLines
from tests.conftest import small_run


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


def planning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, terminal: bool) -> str:
    """What `sdtrain plan --fit-to` shows while it tries what could be given up."""
    from sdtrain.commands.front.plan import plan_config
    from sdtrain.config.write import config_to_toml
    from sdtrain.training.planning import plan
    from sdtrain.training.planning.trace import Phase

    text = io.StringIO()

    def planned(config: Config, *_: object) -> plan.Plan:
        kept = {"kept for backward": config.data.batch_size * 2**20}
        return plan.Plan("a CPU", (96, 96), (Phase("train", kept),), {}, 7)

    monkeypatch.setattr(plan, "plan_run", planned)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (96, 96)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a thing")
    (tmp_path / "a.toml").write_text(config_to_toml(resolve(small_run(tmp_path, tmp_path / "pictures"), "test config")))
    console = Console(file=text, width=100, force_terminal=terminal)
    plan_config(tmp_path / "a.toml", ["data.batch_size=2"], console, budget="1.2MB")
    return text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_planning_shows_that_it_is_under_way_and_how_often_it_has_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: bool
) -> None:
    said = planning(monkeypatch, tmp_path, terminal=terminal)
    assert ("planning, choice 2 of what could be given up" in said) == terminal
    assert "fits into 1.2MB with" in said
