"""A power cut at any moment: what was said to be saved is there, and what has its name is whole."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sdtrain import StepRecord
from sdtrain.errors import UserError
from sdtrain.files.tensors import planned, write_safetensors
from sdtrain.files.writer import write_text
from sdtrain.training.keeping.leftovers import remove_leftovers
from sdtrain.training.keeping.newest import find_newest
from sdtrain.training.keeping.states import load_state
from sdtrain.training.watching.log import Log
from tests.conftest import merged, one_in
from tests.faults.disk.calls import Call, Perform, calls_to_disk
from tests.faults.disk.kills import differences, sit
from tests.faults.disk.power import Disk, Tree, fates_of, put
from tests.faults.disk.test_kills import WATCHED, place_of
from tests.faults.small_states import SmallRun

STEPS, KEEP = 3, 2
SETTINGS = "steps = 3"
NOBODY = str(2**22 + 1)
"""The number of a process that cannot be: no system counts that far."""
CONFIG, STATES = "small/config.toml", "small/checkpoints"
WEIGHTS, LOG = "small/weights/small.safetensors", "small/log.jsonl"
FLUSHES = {
    "of the config": r".*/small/\.config\.toml.*",
    "of the weights": r".*/weights/\..*",
    "of the names of the weights": r".*/weights",
    "of the tensors of a state": r".*/\.step-[^/]*/\.(parameters|optimizer).*|.*/\.step-[^/]*/.*\.safetensors",
    "of the index of a state": r".*/\.step-[^/]*/.*state\.json.*",
    "of the names in a state": r".*/\.step-[^/]*",
    "of the names of states": r".*/checkpoints",
    "of the names in the run": r".*/small",
    "of the name of the run": r".*/runs",
    "of the log": r".*/log\.jsonl",
}
"""Every flush of a run: the path of what is flushed."""
NUM_RUNS = 60


@dataclass
class Recorded:
    """A small run by its calls to the disk.

    promised: after how many calls what was said to be on the disk: a file with its content, or a step. states: the
    files of each state. bits: those of the run at its end.
    """

    folder: Path
    calls: list[Call] = field(default_factory=list)
    promised: list[tuple[int, str, bytes | int]] = field(default_factory=list)
    states: dict[int, dict[str, bytes]] = field(default_factory=dict)
    bits: list[bytes] = field(default_factory=list)

    def promise(self, what: str, content: bytes | int) -> None:
        self.promised.append((len(self.calls), what, content))


def record(folder: Path, *, again: bool = False) -> Recorded:
    """Run as `sdtrain fit` does, as far as files go: config, log, states of which the last ones stay, weights.

    again: whether the last state is written once more, over the one that is there.
    """
    recorded = Recorded(folder)
    folder.mkdir()
    run = SmallRun()
    with recording(recorded.calls, folder):
        write_text(folder / CONFIG, SETTINGS)
        recorded.promise(CONFIG, SETTINGS.encode())
        log = Log(folder / LOG, 0)
        for step in range(1, STEPS + 1):
            run.step()
            log.see(StepRecord(step, 0.5, 1, 1.0, ()))
            log.flush()
            state = run.save(folder / STATES, keep=KEEP)
            recorded.promise(STATES, step)
            recorded.promise(LOG, (folder / LOG).read_bytes())
            recorded.states[step] = files_of(state)
        log.close()
        if again:
            recorded.promise(STATES, STEPS - 1)  # two renames are not one: the state before is there meanwhile
            run.save(folder / STATES, keep=KEEP)
            recorded.promise(STATES, STEPS)
        write_safetensors(folder / WEIGHTS, planned(run.parameters), {})
        recorded.promise(WEIGHTS, (folder / WEIGHTS).read_bytes())
    recorded.bits = run.bits()
    return recorded


@contextmanager
def recording(calls: list[Call], folder: Path) -> Iterator[None]:
    """Note the calls that are made under a folder, as those of a process that has ended; not those that fail."""
    own, nobodys = f"-{os.getpid()}-", f"-{NOBODY}-"

    def around(call: Call, perform: Perform) -> Any:
        result = perform(call.data)
        calls.append(replace(call, path=call.path.replace(own, nobodys), to=call.to.replace(own, nobodys)))
        return result

    with calls_to_disk(folder, around):
        yield


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def broken_promises(recorded: Recorded, num_calls: int, folder: Path) -> list[str]:
    """Return what is wrong in a folder that a cut after so many calls has left."""
    found = []
    promised = {what: content for after, what, content in recorded.promised if after <= num_calls}
    for what in (CONFIG, WEIGHTS):
        path = folder / what
        genuine = next(content for _, name, content in recorded.promised if name == what)
        if (what in promised and not path.exists()) or (path.exists() and path.read_bytes() != genuine):
            found.append(f"{what} is not whole")
    lines = (folder / LOG).read_bytes() if (folder / LOG).exists() else b""
    if LOG in promised and not lines.startswith(promised[LOG]):  # type: ignore[arg-type]
        found.append("the log lacks lines of steps that were saved")
    try:
        newest = find_newest(folder / STATES)
    except UserError as error:
        return [*found, str(error)]
    step = newest.state.step if newest.state else 0
    if newest.passed_over:
        found.append(f"damaged: {newest.notes()}")
    if step < promised.get(STATES, 0):  # type: ignore[operator]
        found.append(f"step {step} is the newest, but {promised[STATES]!r} was saved")
    if newest.state and files_of(newest.state.folder) != recorded.states[step]:
        found.append(f"step {step} is another than was saved")
    return found


def gone_on(recorded: Recorded, folder: Path) -> list[str]:
    """Go on to the end from what is there; return in what the end differs from that of the run without a cut."""
    remove_leftovers(folder / "small")
    run, newest = SmallRun(), find_newest(folder / STATES)
    if newest.state is not None:
        run.steps = load_state(newest.state, run.trainable, run.optimizer)
    while run.steps < STEPS:
        run.step()
        run.save(folder / STATES, keep=KEEP)
    found = [] if run.bits() == recorded.bits else ["other bits"]
    last = {f"step-{step:06d}" for step in range(STEPS - KEEP + 1, STEPS + 1)}
    there = {path.name for path in (folder / STATES).iterdir()}
    return found + [f"there are {sorted(there)}"] * (not last <= there or any(name[0] == "." for name in there))


def trees(recorded: Recorded, num_draws: int) -> Iterator[tuple[int, Tree]]:
    """Yield what cuts may leave, each once: after how many calls, and what is there then."""
    disk, rng = Disk(str(recorded.folder), recorded.calls), random.Random(0)
    known: set[bytes] = set()
    for num_calls in range(disk.num_calls + 1):
        promised = sum(after <= num_calls for after, _, _ in recorded.promised)
        for fates in fates_of(disk.pending(num_calls), rng, num_draws):
            tree = disk.after(num_calls, fates)
            key = hashlib.blake2b(repr((promised, sorted(tree.items()))).encode()).digest()
            if key not in known:
                known.add(key)
                yield num_calls, tree


def replayed(recorded: Recorded, folder: Path, num_draws: int) -> tuple[int, int, Counter[str]]:
    """Try what cuts may leave; return how many there are, how many went on to the end, and what is wrong, how often."""
    num_trees, ended, wrong = 0, set[str](), Counter[str]()
    for num_calls, tree in trees(recorded, num_draws):
        num_trees += 1
        where = folder / "after"
        put(tree, where)
        found = broken_promises(recorded, num_calls, where)
        shape = re.sub(r"-[0-9a-f]{8}\.(partial|old)", "", repr(sorted(tree)))
        if not found and shape not in ended:
            ended.add(shape)
            found = gone_on(recorded, where)
        wrong.update(found)
        shutil.rmtree(where)
    return num_trees, len(ended), wrong


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut in earnest here, so that nothing need be flushed, which takes time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_the_log_of_calls_tells_what_is_on_the_disk_where_nothing_is_lost(tmp_path: Path) -> None:
    """Else what is replayed would be something else."""
    recorded = record(tmp_path / "runs")
    put(Disk(str(recorded.folder), recorded.calls).after(len(recorded.calls), {}), tmp_path / "replayed")
    one, other = (
        {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}
        for folder in (tmp_path / "runs", tmp_path / "replayed")
    )
    assert one == other and len(one) > 10


@pytest.mark.parametrize(
    "again", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["once", "over one that is there"]
)
def test_whatever_a_power_cut_leaves_a_run_goes_on_from_the_newest_state_that_was_saved(
    tmp_path: Path, unflushed: None, *, again: bool
) -> None:
    recorded = record(tmp_path / "runs", again=again)
    num_trees, num_ended, wrong = replayed(recorded, tmp_path, num_draws=2)
    print(f"{len(recorded.calls)} calls, {num_trees} ways to be cut, {num_ended} of other files went on to the end")
    assert not wrong, dict(wrong)
    assert num_trees > 150 and num_ended > 50


def test_a_log_that_was_flushed_is_on_the_disk_with_its_name(tmp_path: Path) -> None:
    """Also in a folder that nobody else flushes any more."""
    calls: list[Call] = []
    with recording(calls, tmp_path):
        log = Log(tmp_path / "log.jsonl", 0)
        log.see(StepRecord(1, 0.5, 1, 1.0, ()))
        log.flush()
        log.close()
    disk = Disk(str(tmp_path), calls)
    assert disk.changes and disk.pending(disk.num_calls) == []


@pytest.mark.parametrize("left_out", one_in(3, FLUSHES))
def test_each_flush_that_is_left_out_is_noticed(tmp_path: Path, unflushed: None, left_out: str) -> None:
    """Else the test above would prove nothing of it."""
    recorded = record(tmp_path / "runs")
    meant = [call.what == "flush" and re.fullmatch(FLUSHES[left_out], call.path) is not None for call in recorded.calls]
    assert any(meant), "it is made"
    recorded.calls = [
        replace(call, what="nothing") if is_meant else call
        for call, is_meant in zip(recorded.calls, meant, strict=True)
    ]
    for num_calls, tree in trees(recorded, num_draws=0):
        put(tree, tmp_path / "after")
        if broken_promises(recorded, num_calls, tmp_path / "after"):
            return
        shutil.rmtree(tmp_path / "after")
    pytest.fail("nothing that a cut leaves shows it")


@pytest.mark.slow
def test_a_run_whose_power_was_cut_ends_bit_for_bit_as_it_would_have(
    pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of `sdtrain fit` itself, with everything that it writes; each is gone on with in a process of its own."""
    watched = place_of(pictures, tmp_path_factory.mktemp("power"), WATCHED)
    began, output = time.monotonic(), watched.folder / "recorded" / "runs"
    sat = sit(merged(watched.table, {"output": str(output)}), with_data=True)
    assert (sat.exit_code, sat.error) == (0, "")
    calls = [call for call in sat.calls if call.path != str(output)]  # which stands before all else is done
    disk, rng, problems = Disk(str(output), calls), random.Random(0), list[str]()
    for number in range(NUM_RUNS):
        num_calls = rng.randint(1, disk.num_calls)
        fates = rng.choice(list(fates_of(disk.pending(num_calls), rng, 3)))
        runs = watched.folder / f"cut-{number}" / "runs"
        put(disk.after(num_calls, fates), runs)
        sat = sit(merged(watched.table, {"output": str(runs)}))
        if sat.exit_code != 0 or sat.error:
            problems.append(f"{number}, after {num_calls} calls: it could not go on: {sat.exit_code} {sat.error}")
        else:
            straight = watched.folder / "straight" / "runs" / "small"
            problems += [f"{number}, after {num_calls} calls: {one}" for one in differences(runs / "small", straight)]
    print(f"{NUM_RUNS} cuts in {disk.num_calls} calls, {time.monotonic() - began:.0f} s, {len(problems)} problems")
    assert problems == []
