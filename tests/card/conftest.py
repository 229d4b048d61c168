"""A machine with a card that computes shapes and places only, and whole runs on it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.card.fake_card import Card, card, card_in_use
from tests.card.small_model import write_small_model
from tests.conftest import merged, small_run

Watch = Callable[[Card, Any], None]
"""Is handed the card and a record of the run, in the moment the record is told."""


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("card") / "model")


@pytest.fixture(scope="session")
def card_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is encoded once, for all runs that encode the same; it is zeros."""
    return tmp_path_factory.mktemp("card-cache")


@pytest.fixture
def on_card(
    tmp_path: Path, pictures: Path, small_model: Path, card_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Card]]:
    """Runs `sdtrain fit` on the card, from loading the model to the exported file. Keywords are dotted settings."""
    monkeypatch.setattr("sdtrain.training.run.pick_device", lambda config: card())

    def run(changes: dict[str, Any], watch: Watch = lambda found, record: None) -> Card:
        from sdtrain.commands.fit import fit
        from sdtrain.config.read import resolve

        table = small_run(tmp_path, pictures)
        if changes.get("method.kind") == "full":
            table["method"] = {}
        base = {
            "steps": 1,
            "model.path": str(small_model),
            "model.dtype": "bfloat16",
            "data.resolution_px": 64,
            "data.cache": str(card_cache),
            "preview.num_inference_steps": 1,
            "validation.noise_levels": 1,
        }
        config = resolve(merged(table, {**base, **changes}), "test config")
        text = io.StringIO()
        with card_in_use() as found:
            watchers = [lambda record: watch(found, record)]
            result = fit(config, watchers=watchers, console=Console(file=text, width=200))
        assert result.finished, text.getvalue()
        assert result.weights is not None and result.weights.exists()
        failed = ("no preview of", "the validation of", "could not be saved")
        assert not any(words in text.getvalue() for words in failed), text.getvalue()
        return found

    yield run
