"""Trackers are told what the log tells, and whatever they do the training is the same."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdtrain.config.schema import TrackingConfig
from sdtrain.training.watching.records import PictureRecord, RunRecord
from sdtrain.training.watching.tracking import trackers, watcher
from sdtrain.training.watching.tracking.trackers import open_tracker, tracker_problems

Train = Callable[..., tuple[Path, str]]


def state(run: Path) -> list[bytes]:
    folder = run / "checkpoints" / "step-000004"
    return [(folder / name).read_bytes() for name in ("parameters.safetensors", "optimizer.safetensors")]


class Failing:
    """A tracker that takes a number and then no more."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            raise ConnectionError("the server is gone")
        self.taken.append(step)

    def picture(self, step: int, path: Path) -> None:
        self.taken.append(-step)

    def end(self) -> None:
        raise AssertionError("it was dropped")


def test_a_tracker_that_fails_is_said_once_and_changes_nothing(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    failing, without = Failing(), train({"name": "without"})[0]
    monkeypatch.setattr(watcher, "open_tracker", lambda name, run, project: failing)
    run, said = train({"name": "with", "tracking": {"to": ["tensorboard"]}, "preview.every": 1})
    assert failing.taken == [0, 1, -1], "the picture of step 0, step 1 and its picture"
    assert said.count("the server is gone") == 1
    assert "the watcher tensorboard failed after step 2" in said
    assert state(run) == state(without)


def test_a_tracker_that_cannot_begin_does_not_stop_the_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no folder for you")

    monkeypatch.setattr(watcher, "open_tracker", refuse)
    run, said = train({"tracking": {"to": ["tensorboard", "tensorboard"]}})
    assert said.count("no folder for you") == 1
    assert (run / "weights" / "small.safetensors").exists()


def events(folder: Path) -> list[Any]:
    """The events in TensorBoard's files: a length, a checksum, the content, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += 16 + length
    return found


def test_tensorboard_has_the_numbers_of_the_log_and_the_pictures(train: Train) -> None:
    pytest.importorskip("tensorboardX")
    run, _ = train({"tracking": {"to": ["tensorboard"]}, "preview.every": 2, "method.train": ["unet", "text_encoder"]})
    values: dict[tuple[str, int], float] = {}
    pictures = []
    for event in events(run / "tensorboard"):
        for value in event.summary.value:
            if value.HasField("image"):
                pictures.append((event.step, value.image.encoded_image_string[:4]))
            elif value.HasField("simple_value"):
                values[value.tag, event.step] = value.simple_value
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "groups" in line]
    assert len(steps) == 4
    for line in steps:
        assert values["loss", line["step"]] == pytest.approx(line["loss"], rel=1e-6)
        for name, group in line["groups"].items():
            for what in ("d", "applied_d", "effective_lr"):
                assert values[f"{what}/{name}", line["step"]] == pytest.approx(group[what], rel=1e-6)
    assert {name for name, _ in values if name.startswith("d/")} == {"d/unet", "d/text_encoder"}
    assert pictures == [(0, b"\x89PNG"), (2, b"\x89PNG"), (4, b"\x89PNG")]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logged_run_is_told_names_steps_and_pictures(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is a stand-in that notes what it is called with: neither is installed for the tests."""
    calls: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(("init", options["project"], options["name"], options["config"])),
        log=lambda values: calls.append(values),
        finish=lambda: calls.append("finish"),
        Image=lambda path, caption: f"picture {path} {caption}",
        Settings=lambda **_: None,
    )
    monkeypatch.setitem(sys.modules, name, fake)
    tracker = open_tracker(name, RunRecord("mine", tmp_path, 9, 0, 1e-6, "steps = 9\n"), "cats")
    tracker.numbers(3, {"d/unet": 0.5})
    tracker.picture(3, PictureRecord(3, tmp_path / "a.png").path)
    tracker.end()
    assert calls == [
        ("init", "cats", "mine", {"steps": 9}),
        {"step": 3, "d/unet": 0.5},
        {"step": 3, "previews": f"picture {tmp_path / 'a.png'} step 3"},
        "finish",
    ]


def test_what_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    (problem,) = tracker_problems(TrackingConfig(to=["wandb", "wandb"]))
    assert problem.where == "tracking.to"
    assert problem.what == (
        "wandb needs the package wandb, which is not installed; `pip install wandb`, or take wandb out"
    )


def test_check_tells_it_with_everything_else(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtrain.config.draft import draft_of
    from sdtrain.config.read import overridden
    from sdtrain.errors import UserError
    from sdtrain.training.start import inspect_run

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    wrong = {**table, "tracking": {"to": ["trackio"]}, "model": {"path": "no/such/model"}}
    with pytest.raises(UserError) as raised:
        inspect_run(draft_of(overridden(wrong, "test", ())), decode=False)
    assert {problem.where for problem in raised.value.problems} >= {"tracking.to", "model.path"}


def test_what_is_not_finite_is_left_out() -> None:
    assert trackers.finite({"a": 1.0, "b": float("nan"), "c": None, "d": float("inf")}) == {"a": 1.0}
