"""Runs that stop and go on, by the function behind `sdtrain fit`."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import merged

Fit = Callable[..., tuple[Path, str]]


@pytest.fixture
def own_pictures(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the pictures, which a test may change."""
    return Path(shutil.copytree(pictures, tmp_path / "own pictures"))


@pytest.fixture
def fit(table: dict[str, Any], own_pictures: Path, tmp_path: Path) -> Fit:
    """Trains what the table says with `--set` texts; returns the run's folder and what was printed."""
    table["data"]["folder"] = [{"path": str(own_pictures)}]

    def run(
        changes: dict[str, Any] | None = None, overrides: Sequence[str] = (), *, path: Path | None = None, **how: bool
    ) -> tuple[Path, str]:
        from rich.console import Console

        from sdtrain.commands.fit import fit_config
        from sdtrain.config.read import resolve
        from sdtrain.config.write import config_to_toml

        if path is None:
            path = tmp_path / "mine.toml"
            path.write_text(config_to_toml(resolve(merged(table, changes or {}), "test config")))
        text = io.StringIO()
        result = fit_config(path, overrides, Console(file=text, width=200), **{"resume": False, **how})
        return result.folder, text.getvalue()

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails: what is refused is refused before."""
    from sdtrain.training import fit

    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(fit, "load", loaded)
