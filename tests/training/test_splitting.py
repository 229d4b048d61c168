"""How many pictures are computed at once changes nothing but the rounding of sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdtrain.data.batches import Batch, Batches
from sdtrain.training.computing.objective import Objective

Train = Callable[..., tuple[Path, str]]
Seen = list[tuple[str, str, int, bytes]]
DRAWS = {
    "data.caption_dropout": 0.4,
    "noise.pyramid_discount": 0.3,
    "noise.offset": 0.1,
    "noise.input_perturbation": 0.1,
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the network is shown of each picture: its name, caption, timestep and noisy latents."""
    found: Seen = []
    original = Objective.__call__

    def watched(self: Objective, batch: Batch, generator: Any) -> Tensor:
        noise, noisy, timesteps, _ = self._drawn(batch, generator)
        rows = zip(batch.examples, batch.captions, timesteps.tolist(), noisy, noise, strict=True)
        found.extend(
            (example.path.name, text, timestep, one.numpy().tobytes() + other.numpy().tobytes())
            for example, text, timestep, one, other in rows
        )
        return original(self, batch, generator)

    monkeypatch.setattr(Objective, "__call__", watched)
    return found


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_same_pictures_with_the_same_noise_and_timesteps_however_many_are_computed_at_once(
    train: Train, seen: Seen, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    whole, _ = train(DRAWS | {"name": "whole", "data.gradient_accumulation": 2})
    expected = seen.copy()
    seen.clear()
    original = Batches.at

    def split(self: Batches, step: int, batch_size: int | None = None, **hands: int) -> Iterator[tuple[Batch, float]]:
        return original(self, step, at_once, **hands)

    monkeypatch.setattr(Batches, "at", split)
    parts, _ = train(DRAWS | {"name": "parts", "data.gradient_accumulation": 2})
    assert sorted(seen) == sorted(expected)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3), "an atan2 update tips where a gradient is all but 0"
    assert losses(parts)[0] == pytest.approx(losses(whole)[0], rel=1e-6)
    assert torch.isfinite(torch.tensor(losses(parts))).all()
