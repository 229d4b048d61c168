"""Laws of how much folders count in a run: loss weights, parts of repeats, regularisation pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.training.computing.objective import Objective
from sdtrain.training.keeping.pictures import Changes, Picture, left_now

Train = Callable[..., tuple[Path, str]]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


@pytest.fixture
def two(pictures: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The pictures in two folders, three each."""
    for path in pictures.iterdir():
        folder = tmp_path / ("taught" if path.stem in "012" else "others")
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    return [{"path": str(tmp_path / "taught")}, {"path": str(tmp_path / "others")}]


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], torch.Tensor]]:
    """The folders and the unweighed errors of the pictures of each batch."""
    found: list[tuple[list[str], torch.Tensor]] = []
    inputs, errors = Objective.inputs, Objective._errors
    folders: list[str] = []

    def of_batch(self: Objective, batch: Any, *rest: Any) -> Any:
        folders[:] = [example.path.parent.name for example in batch.examples]
        return inputs(self, batch, *rest)

    def watched(self: Objective, *given: Any) -> torch.Tensor:
        got = errors(self, *given)
        found.append(([*folders], got.detach()))
        return got

    monkeypatch.setattr(Objective, "inputs", of_batch)
    monkeypatch.setattr(Objective, "_errors", watched)
    return found


def test_a_loss_weight_scales_the_error_of_its_pictures(
    train: Train, two: list[dict[str, Any]], errors: list[tuple[list[str], torch.Tensor]]
) -> None:
    one_a_step = {"data.batch_size": 1, "steps": 6}
    run, _ = train({"data.folder": [two[0], two[1] | {"loss_weight": 0.25}], **one_a_step})
    for loss, (folders, error) in zip(losses(run), errors, strict=True):
        assert loss == pytest.approx(float(error) * (0.25 if folders == ["others"] else 1.0), rel=1e-6)
    assert {folder for folders, _ in errors for folder in folders} == {"taught", "others"}


def test_loss_weights_of_one_change_no_bit_and_are_no_part_of_the_validation(
    train: Train, two: list[dict[str, Any]]
) -> None:
    def held_out(run: Path) -> list[float]:
        lines = (run / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["validation"]["loss"] for line in lines if '"validation"' in line]

    settings = {"steps": 2, "validation.share": 0.5, "validation.seed": 1, "validation.every": 1}
    plain, _ = train({"name": "plain", "data.folder": two, **settings})
    ones, _ = train({"name": "ones", "data.folder": [one | {"loss_weight": 1.0} for one in two], **settings})
    light, _ = train({"name": "light", "data.folder": [one | {"loss_weight": 0.5} for one in two], **settings})
    assert losses(plain) == losses(ones)
    assert losses(light)[0] == pytest.approx(losses(plain)[0] / 2)
    assert held_out(plain)[0] == held_out(light)[0], "before the first step the model is the same"


def test_a_run_of_which_parts_are_drawn_goes_on_bit_for_bit(train: Train, two: list[dict[str, Any]]) -> None:
    folders = [two[0] | {"repeats": 1.5}, two[1] | {"repeats": 0.4}]
    straight, _ = train({"name": "straight", "steps": 8, "data.folder": folders})
    train({"name": "parts", "steps": 3, "data.folder": folders})
    parts, _ = train({"name": "parts", "steps": 8, "data.folder": folders}, resume=True)
    assert losses(parts)[-5:] == losses(straight)[-5:]


def test_as_many_regularisation_pictures_are_seen_as_others(
    train: Train, two: list[dict[str, Any]], errors: list[tuple[list[str], torch.Tensor]]
) -> None:
    folders = [two[0] | {"repeats": 4}, two[1] | {"regularisation": True}]
    _, text = train({"data.folder": folders, "data.batch_size": 1, "steps": 24, "preview.prompts": []})
    seen = [folder for folders, _ in errors for folder in folders]
    assert (seen.count("taught"), seen.count("others")) == (12, 12)
    assert "data.folder[1], regularisation: 3 pictures, 12 of them an epoch" in text


def test_what_was_drawn_stays_drawn_when_pictures_change() -> None:
    def picture(name: str, repeats: float) -> Picture:
        return Picture(name, name, "", 64, 64, repeats)

    before = [picture("a", 0.5), picture("b", 0.5), picture("c", 2)]
    now = [picture("new", 0.5), picture("b", 0.5), picture("a", 0.5), picture("c", 3)]
    changes = Changes(before=(None, 1, 0, 2), removed=(), changed=(3,))
    left = left_now(changes, before, now, [1, 0, 1], ([1, 0, 2], [1, 1, 0, 3]))
    assert left == (1, 0, 1, 2), "a is still to be seen and b is not, whatever would be drawn for these numbers now"
