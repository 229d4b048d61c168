"""A disk that fills up under any writer: a sentence or a note, nothing that was there is lost, and the run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sdtrain import NoteRecord, Record, StepRecord
from sdtrain.errors import UserError
from sdtrain.training import outputs
from sdtrain.training.keeping.newest import find_newest
from tests.faults.conftest import Ran, Run, until
from tests.faults.disk.calls import Call
from tests.faults.disk.full import Disk, disk_in, filled_at

NO_ROOM = r"(No space left on device|are needed and [\d,]+ (bytes )?free)"
WATCHED = {"checkpoint.every": 1, "checkpoint.keep": 9, "preview.every": 2, "preview.num_inference_steps": 1}
NOTES = {
    "log": ("/log.jsonl", rf"note: log.jsonl cannot be written \({NO_ROOM}\); the training goes on"),
    "preview": ("/previews/.step-000002", rf"note: no preview of step 2: .*{NO_ROOM}.*; the training goes on"),
    "state": (
        "/checkpoints/.step-000002",
        rf"note: the training state of step 2 could not be saved: .*{NO_ROOM}.*; the training goes on",
    ),
}
"""Writers that the training can do without for a while: where they write, and what is said."""
SENTENCES = {
    "pictures' cache": ("/cache/latents/", rf"cannot write to the cache: {NO_ROOM}; free some space or set data.cache"),
    "captions' cache": ("/cache/captions/", rf"cannot write to the cache: {NO_ROOM}; free some space or set data."),
    "lock": ("/..small.lock.json", rf"could not be written: {NO_ROOM}; nothing was changed; make room or choose"),
    "config": ("/small/.config.toml", rf"could not be written: {NO_ROOM}; nothing was changed; make room or choose"),
    "weights": ("/weights/.small", rf"could not be written: {NO_ROOM}; nothing was changed; make room or choose"),
}
"""Writers without which there is no run, or which come at its end."""


@pytest.fixture(params=["a small disk", pytest.param("said to be full", marks=pytest.mark.slow)])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A real disk where this user may mount one; elsewhere, and in the slow tests as well, one that only says so."""
    found = disk_in(tmp_path / "disk", real=request.param == "a small disk")
    yield found
    found.close()


def writes_to(place: str) -> Callable[[Call], bool]:
    """Return a function that tells the writes into a place, under temporary names too."""
    return lambda call: call.what == "write" and place in call.path


def weights(ran: Ran) -> dict[str, bytes]:
    (path,) = (ran.folder / "weights").iterdir()
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def losses(ran: Ran) -> list[tuple[int, float]]:
    lines = map(json.loads, (ran.folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "groups" in line]


def go_on(run: Run, disk: Disk, straight: Ran, changes: dict[str, Any]) -> Ran:
    """Make room and go on; the run must end as if the disk had been large enough, and leave nothing else."""
    disk.make_room()
    ran = run(changes, resume="auto")
    assert ran.error is None and ran.result is not None and ran.result.finished
    assert ran.state(4) == straight.state(4)
    assert losses(ran) == losses(straight)
    assert weights(ran) == weights(straight)
    dotted = [path.name for path in disk.folder.rglob(".*")]
    assert dotted == [".small.lock"], "nothing half is left"
    return ran


@pytest.mark.parametrize("room_at", [3, 0], ids=["room comes back", "it stays full"])
@pytest.mark.parametrize(
    "writer", [writer if writer == "state" else pytest.param(writer, marks=pytest.mark.slow) for writer in NOTES]
)
def test_a_disk_that_is_full_while_the_training_can_do_without_is_a_note(
    run: Run, straight: Ran, disk: Disk, monkeypatch: pytest.MonkeyPatch, writer: str, room_at: int
) -> None:
    monkeypatch.setattr(outputs, "TRY_AGAIN_STEPS", 1)
    place, said = NOTES[writer]
    changes = WATCHED | {"output": str(disk.folder)}

    with filled_at(disk, writes_to(place)) as met:

        def make_room(record: Record) -> None:
            if isinstance(record, StepRecord) and record.step == room_at:
                until(lambda: bool(met))  # states are written beside the training
                disk.make_room()

        ran = run(changes, watchers=[make_room])
    assert len(met) == 1, "the writer was met"
    notes = [record.text for record in ran.records if isinstance(record, NoteRecord)]
    assert [note for note in notes if re.search(said, note)], notes
    if room_at:
        assert ran.error is None and ran.result is not None and ran.result.finished
        assert losses(ran) == losses(straight), "the log has caught up"
    else:
        assert isinstance(ran.error, UserError) and re.search(NO_ROOM, str(ran.error))
        newest = find_newest(ran.folder / "checkpoints").state
        kept = {"log": None, "preview": 1, "state": 1}[writer]
        assert (newest.step if newest else None) == kept, "what was saved before is whole"
        assert re.search(rf"the training state could not be saved: .*{NO_ROOM}", ran.text)
    go_on(run, disk, straight, changes)


@pytest.mark.parametrize(
    "writer", [pytest.param(name, marks=[pytest.mark.slow] if name == "captions' cache" else []) for name in SENTENCES]
)
def test_a_disk_that_is_full_where_there_is_no_going_on_is_a_sentence(
    run: Run, straight: Ran, disk: Disk, writer: str
) -> None:
    place, said = SENTENCES[writer]
    changes = WATCHED | {"output": str(disk.folder)}
    if "cache" in writer:
        changes["data.cache"] = str(disk.folder / "cache")
    with filled_at(disk, writes_to(place)) as met:
        ran = run(changes)
    assert len(met) == 1, "the writer was met"
    assert isinstance(ran.error, UserError) and ran.error.exit_code == 2
    assert re.search(said, str(ran.error)), str(ran.error)
    if writer == "weights":
        assert ran.state(4) == straight.state(4), "the training state is there"
    else:
        assert not list(disk.folder.glob("small/*")), "nothing has begun"
    go_on(run, disk, straight, changes)
