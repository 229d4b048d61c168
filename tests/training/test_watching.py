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

from sdtrain.families.metadata import D_KEY
from sdtrain.training.computing.objective import Objective
from sdtrain.training.watching import advice
from sdtrain.training.watching.advice import Adviser, stuck_at_d0, stuck_at_stored_d
from sdtrain.training.watching.log import log_line, log_to
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

    run, _ = train({"preview.every": 2, "checkpoint.every": 3, "checkpoint.in_background": False}, watchers=[watch])
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
    assert re.search(r"  10\.0 im(ages|g)/s", last)
    assert "loss 0.5000" in last
    assert last.split("\r")[-1].count("2.0e-05") == 3


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
        Watchers(None, [interrupted]).tell(RUN)


# ---------------------------------------------------------------------- advice


def told(run: RunRecord, *steps: StepRecord) -> list[tuple[int, str]]:
    """All notes that these steps of a run give rise to."""
    adviser = Adviser()
    adviser.notes(run)
    return [(note.step, note.text) for record in steps for note in adviser.notes(record)]


def changed(record: GroupRecord, **values: object) -> GroupRecord:
    return dataclasses.replace(record, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "first"), [(1000, 100), (60, 30), (20, 10), (12, 10)])
def test_a_d_that_is_still_d0_is_told_sooner_in_a_short_run(steps: int, first: int) -> None:
    run = dataclasses.replace(RUN, steps=steps)
    notes = told(run, *(step(number, group(1e-6)) for number in range(1, min(steps, 110) + 1)))
    assert [number for number, text in notes if "still d0" in text] == [first]


def test_a_d_that_stays_at_a_large_d0_is_not_called_useless() -> None:
    run, found = dataclasses.replace(RUN, d0=1e-4), group(1e-4, start_d=1e-4)
    text = stuck_at_d0(run, step(100, found), found)
    assert text and "It learns at that pace, which may be right" in text


def test_a_d_that_grew_or_was_given_is_not_stuck_and_a_frozen_one_is() -> None:
    for found in (group(1.1e-6), changed(group(1e-6, frozen=True), given=True)):
        assert stuck_at_d0(RUN, step(500, found), found) is None
        assert stuck_at_stored_d(RUN, step(500, found), found) is None
    frozen = group(1e-6, frozen=True)
    assert stuck_at_d0(RUN, step(500, frozen), frozen) is not None


def test_a_network_is_compared_with_where_it_started() -> None:
    warm = group(3e-4, start_d=3e-4)
    assert stuck_at_d0(RUN, step(100, warm), warm) is None
    text = stuck_at_stored_d(RUN, step(100, warm), warm)
    assert text and "d of unet is still that of the file in method.init_from (3.0e-04)" in text
    grown = group(4e-4, start_d=3e-4)
    assert stuck_at_stored_d(RUN, step(100, grown), grown) is None


def test_a_resumed_run_is_given_its_hundred_steps() -> None:
    resumed, stuck = dataclasses.replace(RUN, first_step=400), group(1e-6)
    assert stuck_at_d0(resumed, step(450, stuck), stuck) is None
    assert stuck_at_d0(resumed, step(500, stuck), stuck) is not None


GROWN = group(1e-3)
ONE_SENTENCE = {
    "stuck at d0": ([group(1e-6)] * 150, 100, "after 100 steps d of unet is still d0 = 1e-06, so it learns next to"),
    "stuck at a stored d": ([group(1e-4, start_d=1e-4)] * 150, 100, "after 100 steps d of unet is still that of the"),
    "frozen while climbing": (
        [changed(group(1e-4), climbing=True), *[changed(group(1e-4, frozen=True), climbing=True)] * 2],
        2,
        "d of unet was still climbing when optimizer.prodigy_steps froze it at 1.0e-04",
    ),
    "climbing at the end": (
        [*[GROWN] * 999, changed(GROWN, climbing=True)],
        1000,
        "d of unet was still climbing when the run ended, at 1.0e-03",
    ),
    "frozen too small": ([group(5e-8, start_d=1e-8, frozen=True)] * 3, 1, "d of unet is frozen at 5.0e-08"),
    "running away": ([*[GROWN] * 600, *[group(2.1e-3)] * 3], 601, "d of unet doubled late, from 1.0e-03 at step 1"),
    "no gradient": ([changed(GROWN, gradient=0.0)] * 30, 10, "unet got no gradient in 10 steps"),
    "up still zero": ([changed(GROWN, at_zero=True)] * 30, 10, "up matrices of unet are still zero"),
    "a weight that waited": (
        [*[GROWN] * 999, changed(GROWN, weight=0.5, settled=False)],
        1000,
        "the weight of unet (0.5, of method.lr, optimizer.lr and optimizer.d_coef) did not count",
    ),
}


@pytest.mark.parametrize("case", ONE_SENTENCE)
def test_each_piece_of_advice_is_one_note_once_with_the_name_of_the_network(case: str) -> None:
    groups, when, text = ONE_SENTENCE[case]
    notes = told(RUN, *(step(number, now) for number, now in enumerate(groups, 1)))
    assert [number for number, _ in notes] == [when]
    assert notes[0][1].startswith("note: ") and text in notes[0][1]


def test_a_weight_that_nobody_chose_is_not_told_of_where_it_did_not_count() -> None:
    run = dataclasses.replace(RUN, steps=1, usual_weight=2.0)
    for weight, is_told in ((2.0, False), (1.0, False), (1.5, True)):  # 1.5: 0.75 of `method.lr`
        notes = told(run, step(1, changed(group(1e-3), weight=weight, settled=False)))
        assert any("did not count" in text for _, text in notes) is is_told


def test_a_factor_that_comes_to_count_late_is_no_d_that_doubled() -> None:
    late = changed(GROWN, d=2 * GROWN.d, found_d=GROWN.d, weight=2.0)
    assert told(RUN, *(step(number, GROWN if number < 700 else late) for number in range(1, 1001))) == []


def test_each_network_is_told_of_at_its_own_time() -> None:
    useless = group(5e-8, start_d=1e-8, frozen=True)
    other = changed(useless, name="text_encoder")
    notes = told(RUN, step(1, changed(useless, frozen=False), other), step(2, useless, other), step(3, useless, other))
    assert [(number, " of text_encoder " in text) for number, text in notes] == [(1, True), (2, False)]


@pytest.mark.parametrize("first", [0, 25])
def test_a_d_that_climbs_for_the_first_time_does_not_run_away(first: int) -> None:
    climb = [
        changed(group(1.01e-6 * 1.19 ** max(0, number - first)), climbing=number > first + 2, settled=False)
        for number in range(39)
    ]
    run = dataclasses.replace(RUN, steps=40)
    assert told(run, *(step(number, now) for number, now in enumerate(climb, 1))) == []


def test_a_d_far_below_another_networks_is_useless_once_frozen() -> None:
    frozen, other = group(5e-6, frozen=True), group(1e-3, name="text_encoder")
    notes = told(RUN, step(1, frozen, other))
    assert len(notes) == 1 and "d of unet is frozen at 5.0e-06, which is useless: that of text_encoder" in notes[0][1]
    assert told(RUN, step(1, group(5e-5, frozen=True), other)) == []


def test_a_network_that_was_stopped_is_left_in_peace() -> None:
    stopped = changed(group(1e-6, frozen=True), stopped=True, climbing=True, at_zero=True, gradient=0.0, settled=False)
    assert told(RUN, *(step(number, stopped) for number in range(1, 1001))) == []


def test_notes_are_lines_of_the_log_of_their_own(tmp_path: Path) -> None:
    with log_to(tmp_path / "log.jsonl", 0) as log:
        for record in (step(1, GROWN), NoteRecord(1, "größer"), SavedRecord(1, tmp_path, "state"), step(2, GROWN)):
            log.see(record)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[1] == '{"step": 1, "note": "größer"}'
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2]


def test_a_run_from_a_file_starts_at_the_files_d_before_and_after_it_is_resumed(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "FIRST_STEPS", 1)
    first, _ = train({"name": "first", "optimizer.d0": 0.05})  # more than is ever found, so that it stays
    seen: list[Record] = []
    warm = {
        "name": "warm",
        "method.init_from": str(first / "weights" / "first.safetensors"),
        "optimizer.d0": 1e-6,
    }
    _, text = train(warm | {"steps": 2}, watchers=[seen.append])
    run, resumed = train(warm | {"steps": 4}, resume=True, watchers=[seen.append])
    steps = [record for record in seen if isinstance(record, StepRecord)]
    stored = json.loads((first / "log.jsonl").read_text().splitlines()[-1])["groups"]["unet"]["d"]
    assert stored > 1e-4
    assert [record.groups[0].start_d for record in steps] == pytest.approx([stored] * 4)
    for said in (text, resumed):
        assert said.count("d of unet is still that of the file in method.init_from") == 1
        assert "is still d0" not in said
    assert steps[-1].groups[0].d == pytest.approx(2 * stored), "a short run makes larger steps, from d_coef = auto"
    with safe_open(run / "weights" / "warm.safetensors", "pt") as file:
        handed_on = json.loads(file.metadata()[D_KEY])
    assert handed_on == {"unet": pytest.approx(stored)}, "the factor would be put on it again and again"
