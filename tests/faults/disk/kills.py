"""Runs that are killed: each in a process of its own, forked from one that has imported everything already."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from sdtrain.files.header import read_header
from sdtrain.training.keeping.manifest import DamagedError, read_index, require_whole, state_folders
from tests.faults.disk.calls import Call, Perform, calls_to_disk
from tests.forked import forking

PATIENCE_S = 120
"""A process that takes longer hangs: it is ended, and its test fails."""


@dataclass(frozen=True)
class Kill:
    """When a run kills itself: at one of its calls to the disk, or some time into a step.

    sort: what the call does, see `sort_of`; nth: which one of these, from 1. halfway: after half of what is written.
    after_s: seconds after the `step`-th step of this process has begun.
    """

    sort: str = ""
    nth: int = 0
    moment: Literal["before", "halfway", "after"] = "before"
    step: int = 0
    after_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.moment}: {self.sort}" if self.sort else "inside a step"


@dataclass(frozen=True)
class Sat:
    """What became of a process that trained. error: what it raised, in words.

    calls: those that it made to the disk; none of one that was killed.
    """

    exit_code: int | None
    error: str = ""
    calls: tuple[Call, ...] = ()
    seconds: tuple[float, ...] = ()
    """How long each step took."""


def sit(table: Mapping[str, Any], kill: Kill | None = None, broken: str = "", *, with_data: bool = False) -> Sat:
    """Train what a table says in a fresh process, going on where there is something to go on from.

    broken: a fault of the program, by its name in BROKEN. with_data: whether the calls hold what was written.
    """
    context = forking()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(table, kill, broken, with_data, there))
    process.start()
    there.close()
    try:
        error, calls, seconds = here.recv()
    except EOFError:
        error, calls, seconds = "", (), ()
    process.join(PATIENCE_S)
    sat = Sat(process.exitcode, error, calls, seconds)
    process.close()
    return sat


def _train(table: Mapping[str, Any], kill: Kill | None, broken: str, with_data: bool, connection: Connection) -> None:
    """Train, as a process of its own."""
    import torch
    from rich.console import Console

    from sdtrain import fit, make_config

    signal.alarm(PATIENCE_S)
    torch.set_num_threads(1)
    calls: list[Call] = []
    numbers = Counter[str]()
    seconds: list[float] = []

    def around(call: Call, perform: Perform) -> Any:
        if kill is None or sort_of(call) != kill.sort:
            result = perform(call.data)
            calls.append(call if with_data else replace(call, data=b""))
            return result
        numbers[kill.sort] += 1
        if numbers[kill.sort] != kill.nth:
            return perform(call.data)
        try:
            if kill.moment != "before":
                perform(call.data[: len(call.data) // 2] if kill.moment == "halfway" else call.data)
        finally:  # a call may also find that its folder is there already, or its file gone
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    error = ""
    config = make_config(dict(table))
    with ExitStack() as stack:
        if broken:
            stack.enter_context(BROKEN[broken]())
        stack.enter_context(_steps(kill, seconds))
        stack.enter_context(calls_to_disk(Path(config.output), around))
        try:
            assert fit(config, resume="auto", console=Console(file=io.StringIO())).finished
        except Exception as raised:  # noqa: BLE001 - whatever it is, the test looks at it
            error = f"{type(raised).__name__}: {raised}"
    connection.send((error, tuple(calls), tuple(seconds)))


@contextmanager
def _steps(kill: Kill | None, seconds: list[float]) -> Iterator[None]:
    """Note how long each step takes, and kill in the middle of the one that is meant."""
    from sdtrain.training.computing.objective import Objective
    from sdtrain.training.outputs import Training, checkpoint

    begin, began = Objective.__call__, 0.0

    def call(self: Objective, *arguments: Any) -> Any:
        nonlocal began
        began = time.monotonic()
        if kill is not None and len(seconds) + 1 == kill.step:
            threading.Timer(kill.after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return begin(self, *arguments)

    def end(training: Training, *arguments: Any) -> None:
        seconds.append(time.monotonic() - began)
        checkpoint(training, *arguments)

    with mock.patch.object(Objective, "__call__", call), mock.patch("sdtrain.training.fit.checkpoint", end):
        yield


# ---------------------------------------------------------------------- copies that are broken on purpose


@contextmanager
def _states_in_place() -> Iterator[None]:
    """A state is written into the folder that has its name already."""

    @contextmanager
    def in_place(path: Path, num_bytes: int = 0) -> Iterator[Path]:
        path.mkdir(parents=True, exist_ok=True)
        yield path

    with mock.patch("sdtrain.training.keeping.states.atomic_folder", in_place):
        yield


@contextmanager
def _optimizer_not_loaded() -> Iterator[None]:
    with mock.patch("optim.ProdigyPlusScheduleFree.load_state_dict", lambda *_: None):
        yield


@contextmanager
def _log_not_cut_back() -> Iterator[None]:
    with mock.patch("sdtrain.training.watching.log._drop_records_after", lambda *_: None):
        yield


BROKEN: dict[str, Callable[[], Any]] = {
    "states are written in place": _states_in_place,
    "the optimizer's state is not loaded": _optimizer_not_loaded,
    "the log is not cut back": _log_not_cut_back,
}

# ---------------------------------------------------------------------- when to kill


def one_round(straight: Sat, rng: random.Random) -> Iterator[Kill]:
    """Yield a kill at every sort of call that a run makes to the disk, in any order.

    After the first, the fourth and so on comes one inside a step.
    """
    numbers = Counter(map(sort_of, straight.calls))
    for index, sort in enumerate(rng.sample(sorted(numbers), len(numbers))):
        moments: list[Literal["before", "halfway", "after"]] = ["before", "after"]
        moment = rng.choice(["halfway", *moments] if sort.startswith("write") else moments)
        yield Kill(sort, rng.randint(1, numbers[sort]), moment)
        if index % 3 == 0:
            step = rng.randint(1, len(straight.seconds))
            yield Kill(step=step, after_s=rng.uniform(0, straight.seconds[step - 1]))


def sort_of(call: Call) -> str:
    """Return what a call does, in words that are the same for every step."""
    name, area = Path(call.path).name, _area(call.path)
    if call.what == "rename":
        if call.to.endswith(".partial"):
            return "rename an old state before its removal"
        return f"give its name to {_area(call.to)}"
    if call.what == "remove folder":
        return "remove the folder of an old state"
    if call.what == "remove":
        if area.startswith("a state's") and not name.startswith("."):
            return "remove a file of an old state"
        return f"make sure that nothing is left of {area}"
    if call.what == "flush" and Path(call.path).suffix == "":
        return f"flush the names in {name}"
    return f"{call.what} {area}"


def _area(path: str) -> str:
    """Return what a file belongs to, without numbers."""
    *_, above, name = Path(path).parts
    plain = re.sub(r"\.[0-9a-f]{8}-\d+-.*", "", name.removeprefix("."))
    if re.match(r"\.?step-\d+", above):
        return f"a state's {plain}"
    if plain.endswith(".lock.json"):
        return "the name of who holds the lock"
    if re.fullmatch(r"step-\d+(\.png)?", plain):
        return "a preview" if plain.endswith(".png") else "a state's folder"
    return "weights" if above == "weights" else plain


# ---------------------------------------------------------------------- what is looked at


def damage(folder: Path) -> list[str]:
    """Return what a kill has done to the files of a run: everything that has its name must be whole."""
    found = []
    for step, entry in state_folders(folder / "checkpoints"):
        try:
            require_whole(read_index(entry, step))
        except DamagedError as error:
            found.append(f"{entry.name}: {error}")
    for path in (folder / "weights").glob("[!.]*"):
        load_file(read_header(path).path)  # raises where it is not whole
    log = folder / "log.jsonl"
    lines = log.read_bytes().split(b"\n") if log.exists() else []
    for line in lines[:-1]:  # the last one may be cut
        json.loads(line)
    return found


def differences(folder: Path, straight: Path) -> list[str]:
    """Return in what a run that was killed and went on to its end differs from one to which nothing happened."""
    found = []
    ours, theirs = _files(folder), _files(straight)
    found += [f"left over: {name}" for name in sorted(ours - theirs)]
    found += [f"missing: {name}" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        one, other = (where / name for where in (folder.parent, straight.parent))
        if name.startswith(f"{folder.name}/weights/"):
            if _weights(one) != _weights(other):
                found.append(f"other weights: {name}")
        elif Path(name).suffix in (".safetensors", ".png") and one.read_bytes() != other.read_bytes():
            found.append(f"other bits: {name}")
    for what, of in (("steps", "step"), ("losses", "loss")):
        one_log, other_log = (_logged(where / "log.jsonl", of) for where in (folder, straight))
        if one_log != other_log:
            found.append(f"other {what} in the log: {one_log} where {other_log} are right")
    return found


def _files(folder: Path) -> set[str]:
    """Return all files of a run, those beside its folder as well."""
    return {str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*") if path.is_file()}


def _weights(path: Path) -> dict[str, bytes]:
    return {name: np.ascontiguousarray(values).tobytes() for name, values in load_file(path).items()}


def _logged(path: Path, key: str) -> Sequence[Any]:
    return [json.loads(line)[key] for line in path.read_text().splitlines() if '"groups"' in line]


@dataclass(frozen=True)
class Outcome:
    """What became of a run that was to be killed. landed: the kills that came before its end. problems: in words."""

    landed: tuple[Kill, ...]
    problems: tuple[str, ...]


def killed_and_gone_on(
    table: Mapping[str, Any], folder: Path, straight: Path, plan: Sequence[Kill], broken: str = ""
) -> Outcome:
    """Kill a run, several times in a row for several kills, let it go on to its end, and look at what is there.

    straight: the folder of the same run, to which nothing happened.
    """
    assert not folder.exists(), f"{folder} holds a run already"
    landed, problems = list[Kill](), list[str]()
    for kill in plan:
        sat = sit(table, kill, broken)
        if sat.exit_code == -signal.SIGKILL:
            landed.append(kill)
        elif sat.exit_code != 0 or sat.error:
            problems.append(f"{kill}: it ended with {sat.exit_code} {sat.error}")
        try:
            problems += [f"{kill}: {what}" for what in damage(folder)]
        except (OSError, ValueError) as error:
            problems.append(f"{kill}: {error}")
    sat = sit(table, None, broken)
    if sat.exit_code != 0 or sat.error:
        problems.append(f"it could not go on: {sat.exit_code} {sat.error}")
    else:
        problems += differences(folder, straight)
    return Outcome(tuple(landed), tuple(problems))
