"""`view` tells exactly what the loop trains on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.errors import UserError
from sdtrain.training.computing import objective

CHANGES = {"data.gradient_accumulation": 2, "data.caption_dropout": 0.3, "data.caption_variants": 3}


def viewed(folder: Path, step: int) -> str:
    from sdtrain.commands.view import planned_step, step_lines

    return "\n".join(step_lines(planned_step(folder / "config.toml", [], step)))


@pytest.mark.parametrize("networks", [["unet"], ["unet", "text_encoder"]])
def test_pictures_captions_and_timesteps_are_those_of_the_loop(
    train: Callable[..., tuple[Path, str]], pictures: Path, monkeypatch: pytest.MonkeyPatch, networks: list[str]
) -> None:
    seen: list[list[tuple[str, str, int]]] = []
    plain = objective.Objective._drawn

    def noted(self: objective.Objective, batch: Any, generator: Any) -> Any:
        drawn: tuple[torch.Tensor, ...] = plain(self, batch, generator)
        names = [str(example.path) for example in batch.examples]
        seen.append(list(zip(names, batch.captions, drawn[2].tolist(), strict=True)))
        return drawn

    monkeypatch.setattr(objective.Objective, "_drawn", noted)
    folder = {"path": str(pictures), "caption_lines": "drawn", "trigger": "sks", "shuffle_tags": True}
    run, _ = train({**CHANGES, "data.folder": [{**folder, "tag_separator": " "}], "method.train": networks})
    told = []
    for step in range(1, 5):
        text = viewed(run, step)
        assert text.startswith(f"step {step} of 4")
        timesteps = [int(number) for number in re.findall(r"timestep (\d+)", text)]
        captions = [line.strip() for line in text.splitlines() if "caption" in line]
        captions = [line.removeprefix("caption: ") if line.startswith("caption: ") else "" for line in captions]
        names = [line.strip() for line in text.splitlines() if line.strip().startswith(str(pictures))]
        told.append(list(zip(names, captions, timesteps, strict=True)))
    trained = [seen[2 * step] + seen[2 * step + 1] for step in range(4)]
    assert told == trained
    assert any(caption == "" for step in told for _, caption, _ in step)


def test_a_step_that_the_run_does_not_have_is_refused(train: Callable[..., tuple[Path, str]]) -> None:
    run, _ = train({"steps": 1})
    assert "1 picture" in viewed(run, 1) or "pictures" in viewed(run, 1)
    with pytest.raises(UserError, match="beyond steps = 1"):
        viewed(run, 2)
