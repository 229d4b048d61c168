"""Who watches a run is told everything and disturbs nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from sdtrain.training.objective import Objective
from sdtrain.training.watching import advice
from sdtrain.training.watching.advice import Adviser, stuck_at_d0, stuck_at_stored_d
from sdtrain.training.watching.log import log_line
from sdtrain.training.watching.records import (
    EndRecord,
    GroupRecord,
    NoteRecord,
    PictureRecord,
    Record,
    RunRecord,
    SavedRecord,
    StepRecord,
)
from sdtrain.training.watching.screen import Screen
from sdtrain.training.watching.watchers import Watchers

Train = Callable[..., tuple[Path, str]]
RUN = RunRecord(name="a", folder=Path("a"), steps=1000, first_step=0, d0=1e-6, config_toml="")


def bits(run: Path) -> dict[str, bytes]:
    """The numbers and the pictures of the training state after four steps, and the exported tensors.

    Its settings name the run, and its index has their digest.
    """
    state = run / "checkpoints" / "step-000004"
    names = ("parameters.safetensors", "optimizer.safetensors", "pictures.json")
    files = {name: (state / name).read_bytes() for name in names}
    with safe_open(next((run / "weights").iterdir()), "pt") as weights:
        return files | {name: weights.get_tensor(name).numpy().tobytes() for name in weights.keys()}  # noqa: SIM118


def of_kind(records: list[Record], kind: type) -> list[Record]:
    return [record for record in records if isinstance(record, kind)]


def group(d: float, *, start_d: float = 1e-6, frozen: bool = False, name: str = "unet") -> GroupRecord:
    return GroupRecord(name, d, d, d, frozen, start_d)


def step(number: int, *groups: GroupRecord) -> StepRecord:
    return StepRecord(number, 0.5, 2, 10.0, groups)


# ---------------------------------------------------------------------- what is told


def test_everything_that_happens_is_told_in_its_order_and_is_there_when_it_is_told(train: Train) -> None:
    seen: list[Record] = []

    def watch(record: Record) -> None:
        if isinstance(record, PictureRecord | SavedRecord):
            assert record.path.exists()
        seen.append(record)

    run, _ = train({"preview.every": 2, "checkpoint.every": 3}, watchers=[watch])
    told = [f"{type(record).__name__.removesuffix('Record')} {getattr(record, 'step', '')}".strip() for record in seen]
    assert told == [
        *("Run", "Picture 0", "Step 1", "Step 2", "Picture 2", "Step 3", "Saved 3"),
        *("Step 4", "Picture 4", "Saved 4", "Saved 4", "End 4"),
    ]
    assert seen[-1] == EndRecord(4, "finished")
    saved = [(record.path, record.what) for record in seen if isinstance(record, SavedRecord)]
    assert saved[-2:] == [(run / "checkpoints/step-000004", "state"), (run / "weights/small.safetensors", "weights")]
    assert isinstance(seen[0], RunRecord)
    assert (seen[0].folder, seen[0].steps, seen[0].first_step) == (run, 4, 0)
    assert seen[0].config_toml == (run / "config.toml").read_text(encoding="utf-8")


def test_the_log_holds_the_records_of_the_steps(train: Train) -> None:
    seen: list[Record] = []
    run, _ = train(watchers=[seen.append])
    expected = [log_line(record) for record in seen if isinstance(record, StepRecord)]
    assert (run / "log.jsonl").read_text(encoding="utf-8").splitlines() == expected
    assert [json.loads(line)["step"] for line in expected] == [1, 2, 3, 4]


def test_a_line_of_the_log_keeps_its_form() -> None:
    record = StepRecord(7, 0.25, 4, 3.14159, (GroupRecord("unet", 1e-4, 2e-4, 3e-5, True, 1e-6),))
    assert log_line(record) == (
        '{"step": 7, "loss": 0.25, "images_per_s": 3.142, "groups": {"unet": {"d": 0.0001, "applied_d": 0.0002, '
        '"effective_lr": 3e-05, "frozen": true}}}'
    )
    for loss in (float("nan"), float("inf"), -float("inf")):
        assert json.loads(log_line(dataclasses.replace(record, loss=loss)))["loss"] is None


def test_a_run_that_fails_ends_for_its_watchers_too(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = Objective.__call__, list[Record]()

    def broken(self: Objective, batch: object, generator: object) -> torch.Tensor:
        if len(of_kind(seen, StepRecord)) == 2:
            raise RuntimeError("the card fell out")
        return original(self, batch, generator)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "__call__", broken)
    with pytest.raises(RuntimeError, match="the card fell out"):
        train(watchers=[seen.append])
    assert seen[-1] == EndRecord(2, "failed")


def test_a_stopped_run_says_so(train: Train) -> None:
    seen: list[Record] = []

    def stop(record: Record) -> None:
        seen.append(record)
        if isinstance(record, StepRecord) and record.step == 2:
            signal.raise_signal(signal.SIGINT)

    train(watchers=[stop])
    assert seen[-1] == EndRecord(2, "stopped")
    train(resume=True, watchers=[seen.append])
    assert seen[-1] == EndRecord(4, "finished")
    assert [record.first_step for record in seen if isinstance(record, RunRecord)] == [0, 2]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_shows_the_time_left_and_every_number(columns: int) -> None:
    text = io.StringIO()
    names = ("unet", "text_encoder", "text_encoder_2")
    with Screen(Console(file=text, width=columns, force_terminal=True), RUN) as screen:
        screen.see(step(137, *(group(2e-5, name=name) for name in names)))
        screen.see(NoteRecord(137, "something to know"))
    shown = text.getvalue()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).split("something to know")[-1]
    assert "…" not in shown
    assert re.search(r"step 137/1000 .* left [-0-9]", last)
    for number in ("loss 0.5000", "10.0 images/s", *(f"{name} 2.0e-05" for name in names)):
        assert number in " ".join(last.split()), number


@pytest.mark.parametrize(("steps", "lines"), [(1, 1), (20, 20), (39, 20), (1000, 20)])
def test_plain_lines_are_few(steps: int, lines: int) -> None:
    text = io.StringIO()
    with Screen(Console(file=text, width=200), dataclasses.replace(RUN, steps=steps)) as screen:
        for number in range(1, steps + 1):
            screen.see(step(number, group(1e-5)))
    shown = text.getvalue().splitlines()
    assert len(shown) == lines
    assert shown[-1].startswith(f"step {steps}/{steps}  0 s left  loss 0.5000  10.0 images/s  effective_lr unet")


# ---------------------------------------------------------------------- what is not disturbed


def leaves(value: object) -> list[object]:
    """Everything in a record that holds nothing itself."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        assert type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
        return [leaf for field in dataclasses.fields(value) for leaf in leaves(getattr(value, field.name))]
    if isinstance(value, tuple):
        return [leaf for entry in value for leaf in leaves(entry)]
    return [value]


def test_records_are_immutable_to_their_leaves(train: Train) -> None:
    seen: list[Record] = []
    train({"preview.every": 4}, watchers=[seen.append])
    assert {type(record) for record in seen} == {RunRecord, StepRecord, PictureRecord, SavedRecord, EndRecord}
    for record in (*seen, NoteRecord(1, "a note")):
        for leaf in leaves(record):
            assert isinstance(leaf, int | float | str | Path), f"{type(leaf).__name__} in {record}"
        assert type(record).__module__ == RunRecord.__module__, "nothing of the training's own is handed out"
    first = next(record for record in seen if isinstance(record, StepRecord))
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.loss = 0.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.groups[0].d = 0.0  # type: ignore[misc]


def look(record: Record) -> None:
    """A watcher that does what watchers should not, but for raising."""
    random.seed(1)
    torch.manual_seed(1)
    torch.rand(5)
    str(record)


def fail(record: Record) -> None:
    raise RuntimeError("no network")


def tamper(record: Record) -> None:
    """Raises, for a record cannot be changed."""
    if isinstance(record, StepRecord):
        record.groups[0].d = 1e3  # type: ignore[misc]


@pytest.mark.parametrize("watcher", [look, fail, tamper], ids=lambda watcher: watcher.__name__)
def test_watchers_do_not_change_the_training(train: Train, watcher: Callable[[Record], None]) -> None:
    without, _ = train({"name": "without", "preview.every": 2})
    watched, _ = train({"name": "watched", "preview.every": 2}, watchers=[watcher])
    assert bits(without) == {name.replace("watched", "without"): value for name, value in bits(watched).items()}, (
        "with watchers == without, bit for bit"
    )


def test_a_watcher_that_fails_is_named_once_and_asked_no_more(train: Train) -> None:
    seen: list[Record] = []
    asked: list[Record] = []

    class Tracker:
        def __call__(self, record: Record) -> None:
            asked.append(record)
            if len(asked) == 3:
                raise ConnectionError("tracker.example does not answer")

    _, text = train(watchers=[Tracker(), seen.append])
    assert len(asked) == 3
    assert text.count("the watcher") == 1
    assert "the watcher Tracker failed after step 2 (ConnectionError: tracker.example does not answer)" in text
    assert len(of_kind(seen, NoteRecord)) == 1, "the others are told"
    assert len(of_kind(seen, StepRecord)) == 4, "and go on watching"


def test_an_interrupt_inside_a_watcher_is_an_interrupt() -> None:
    def interrupted(record: Record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Watchers([], [interrupted]).tell(RUN)


def test_what_fails_of_our_own_is_raised() -> None:
    with pytest.raises(RuntimeError, match="no network"):
        Watchers([fail], []).tell(RUN)


# ---------------------------------------------------------------------- advice


def test_a_d_that_is_still_d0_is_told_after_a_hundred_steps_and_once() -> None:
    adviser = Adviser()
    adviser.notes(RUN)
    assert adviser.notes(step(99, group(1e-6))) == []
    assert [note.step for note in adviser.notes(step(100, group(1e-6)))] == [100]
    assert adviser.notes(step(101, group(1e-6))) == []
    text = stuck_at_d0(RUN, step(100, group(1e-6), group(1e-3, name="text_encoder")))
    assert text and "d of unet is still d0 = 1e-06, so it learns next to nothing" in text


@pytest.mark.parametrize("moved", [group(1.1e-6), group(1e-6, frozen=True)], ids=["grown", "frozen"])
def test_a_d_that_grew_or_is_frozen_is_not_stuck(moved: GroupRecord) -> None:
    assert stuck_at_d0(RUN, step(500, moved)) is None
    assert stuck_at_stored_d(RUN, step(500, moved)) is None


def test_a_network_is_compared_with_where_it_started() -> None:
    warm = group(3e-4, start_d=3e-4)
    assert stuck_at_d0(RUN, step(100, warm)) is None
    text = stuck_at_stored_d(RUN, step(100, warm, group(1e-6, name="text_encoder")))
    assert text and "unet (3.0e-04)" in text and "text_encoder" not in text
    assert stuck_at_stored_d(RUN, step(100, group(4e-4, start_d=3e-4))) is None


def test_a_resumed_run_is_given_its_hundred_steps() -> None:
    resumed = dataclasses.replace(RUN, first_step=400)
    assert stuck_at_d0(resumed, step(450, group(1e-6))) is None
    assert stuck_at_d0(resumed, step(500, group(1e-6))) is not None


def test_a_run_from_a_file_starts_at_the_files_d_before_and_after_it_is_resumed(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "STUCK_STEPS", 2)
    first, _ = train({"name": "first", "optimizer.d0": 0.05})  # more than is ever found, so that it stays
    seen: list[Record] = []
    warm = {
        "name": "warm",
        "method.init_from": str(first / "weights" / "first.safetensors"),
        "optimizer.d0": 1e-6,
    }
    _, text = train(warm | {"steps": 2}, watchers=[seen.append])
    _, resumed = train(warm | {"steps": 4}, resume=True, watchers=[seen.append])
    steps = [record for record in seen if isinstance(record, StepRecord)]
    stored = json.loads((first / "log.jsonl").read_text().splitlines()[-1])["groups"]["unet"]["d"]
    assert stored > 1e-4
    assert [record.groups[0].start_d for record in steps] == pytest.approx([stored] * 4)
    for said in (text, resumed):
        assert said.count("d is still that of the file in method.init_from: unet") == 1
        assert "is still d0" not in said
