"""Laws of flips, crops and resolutions in a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Train = Callable[..., tuple[Path, str]]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


@pytest.fixture
def settings(pictures: Path) -> dict[str, Any]:
    folder = {"path": str(pictures), "flip": True, "crops": 2, "resolutions_px": [64, 96], "repeats": 1.5}
    return {"data.folder": [folder], "data.ragged": "merge", "validation.share": 0.5, "validation.seed": 1}


def test_a_run_of_many_views_goes_on_bit_for_bit(train: Train, settings: dict[str, Any]) -> None:
    straight, text = train({"name": "straight", "steps": 8, **settings})
    train({"name": "parts", "steps": 3, **settings})
    parts, _ = train({"name": "parts", "steps": 8, **settings}, resume=True)
    assert losses(parts)[-5:] == losses(straight)[-5:]
    assert "views of" in text and "of them flipped" in text


def test_the_order_of_a_state_has_the_buckets_that_are_trained(train: Train, settings: dict[str, Any]) -> None:
    """Of pictures at several resolutions, and of those that were moved because they were alone."""
    from sdtrain.config.read import read_draft
    from sdtrain.data.identity.held_out import training_examples
    from sdtrain.data.order import Plan
    from sdtrain.data.placing import placements_of
    from sdtrain.training.keeping.pictures import pictures_of
    from sdtrain.training.keeping.standing import _order
    from sdtrain.training.start import inspect_run

    run, _ = train({"steps": 1, **settings})
    draft = read_draft(run / "config.toml", [])
    _, examples = inspect_run(draft, decode=False)
    config, trained = draft.require_sound(), training_examples(examples)
    register = pictures_of(trained, [bytes(16)] * len(trained), {})
    placements = placements_of(trained, config.data)
    assert _order(config, register, Plan(2, 1)).buckets == tuple(one.bucket for one in placements)
