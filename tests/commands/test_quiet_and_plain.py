"""What `fit` tells with --quiet and --plain."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sdtrain.cli import app
from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from sdtrain.errors import UserError


@pytest.fixture
def config(tmp_path: Path, table: dict[str, Any]) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(config_to_toml(resolve(table | {"steps": 2, "name": "small"}, "test")), encoding="utf-8")
    return path


def fit(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["fit", str(config), *arguments])


def test_quiet_tells_the_result_and_nothing_else(config: Path) -> None:
    lines = fit(config, "--quiet").output.splitlines()
    assert lines[0].startswith("╭─ done: 2 steps in ")
    assert not any("step 1/2" in line or "sdtrain fit: " in line for line in lines)
    assert any("weights" in line for line in lines)
    assert fit(config, "--quiet", "--resume-or-start").output.startswith("done: all 2 steps; ")


def test_quiet_still_tells_errors(config: Path) -> None:
    done = fit(config, "--quiet", "--steps", "1", "--set", "data.batch_size=0")
    assert isinstance(done.exception, UserError)
    assert "data.batch_size" in done.exception.text()


def test_quiet_still_answers_ctrl_c(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("sdtrain.training.fit.load", press)
    done = fit(config, "--quiet")
    assert done.exit_code == 130
    assert "Ctrl-C: stopped while loading the model; nothing was trained yet" in " ".join(done.output.split())


def test_plain_tells_lines_of_ascii(config: Path) -> None:
    said = fit(config, "--plain").output
    assert said.isascii() and "\x1b" not in said
    assert "+- sdtrain fit: " in said and "+- done: 2 steps" in said
    assert "step 1/2  " in said and "step 2/2  0 s left  loss " in said


def test_one_of_them_is_enough(config: Path) -> None:
    done = fit(config, "--plain", "--quiet")
    assert isinstance(done.exception, UserError)
    assert "give one of them" in done.exception.text()
