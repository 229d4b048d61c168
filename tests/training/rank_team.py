"""Processes that train one run together, kept for many runs."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from tests.forked import forking

DAY_S = 400.0
"""How long a test waits for a rank, which may compile kernels on a busy machine."""
SLOW_S = 8.0
"""What a slow disk takes for a state: longer than a rank may be silent in these tests."""


@dataclass
class Told:
    """What came of a run on one rank: a text, an exit code, the applied d, a digest of the weights and the pictures by
    step, the cache entries that it wrote, the pictures of each validation, and how often and how many bytes were added
    up by the beginning of each step."""

    rank: int
    code: int
    text: str = ""
    d: list[list[float]] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    pictures: list[list[str]] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    validated: list[list[str]] = field(default_factory=list)
    added_up: list[tuple[int, int]] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    travelled: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """How often and how many bytes were gathered and reduced by the beginning of each step, of split weights."""
    held: int = 0
    """The numbers of trained parameters that lie here."""


@dataclass(frozen=True)
class Job:
    """A run: its config as a table, and what happens on which rank: `{"stop": (rank, step)}` and the like."""

    table: dict[str, Any]
    resume: bool = False
    events: dict[str, tuple[int, int]] = field(default_factory=dict)
    changes: dict[int, dict[str, Any]] = field(default_factory=dict)


class Team:
    """`size` processes, each the rank of its number."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._begin()

    def _begin(self) -> None:
        context = forking()
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, ranks: int, job: Job, *, of: int | None = None) -> list[Told]:
        """Train a run on so many of the processes; a process that died tells the code -9. of: how many of them are
        asked what came of it, if not all."""
        port = free_port()
        for rank, pipe in enumerate(self._pipes[:ranks]):
            pipe.send((rank, ranks, port, job))
        told = []
        for rank, pipe in enumerate(self._pipes[: of or ranks]):
            try:
                if not pipe.poll(DAY_S):
                    self.end()
                    self._begin()  # or the next test would hear the answer to this one
                    raise AssertionError(f"rank {rank} does not answer")
                told.append(pipe.recv())
            except EOFError:
                told.append(Told(rank, -signal.SIGKILL))
        return told

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        for process in self._processes:
            process.kill()


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        rank, ranks, port, job = pipe.recv()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipe.send(_train(rank, job))


def _train(rank: int, job: Job) -> Told:
    import sdtrain
    from sdtrain.errors import UserError
    from sdtrain.training.ranks import pulse
    from sdtrain.training.ranks.group import ToldElsewhereError
    from tests.conftest import merged

    if job.events.keys() & {"freeze", "freeze in a step", "slow disk"}:
        pulse.BEAT_S, pulse.LOST_S, pulse.LEAVE_S = 0.5, 5.0, 20.0
        sys.stderr = Path(job.table["output"], f"said-by-{rank}.txt").open("w")  # noqa: SIM115 - what it says as it is ended
    told, screen = Told(rank, 0), io.StringIO()
    config = sdtrain.Config.model_validate(merged(job.table, job.changes.get(rank, {})))
    try:
        with _watched(told, job.events):
            done = sdtrain.fit(config, resume=job.resume, console=Console(file=screen, width=200))
        told.code = done.exit_code
    except UserError as error:
        told.code = error.exit_code
        screen.write(str(error))
    except ToldElsewhereError as error:
        told.code = error.exit_code
    told.text = screen.getvalue()
    return told


def _numbers(parameter: Any) -> Any:
    """What all ranks hold of a parameter together."""
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def _here(parameter: Any) -> Any:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


@contextmanager
def _watched(told: Told, events: dict[str, tuple[int, int]]) -> Iterator[None]:
    """Note what a rank does, and let something happen to it after a step."""
    import errno
    import hashlib

    import torch
    import torch.distributed as dist

    from sdtrain.data import encoding
    from sdtrain.training import fit, outputs
    from sdtrain.training.computing.objective import Objective
    from sdtrain.training.ending import settling
    from sdtrain.training.validating.held_out import HeldOut

    records, later, gradients = settling.group_records, settling.group_records_later, fit.gradients
    store, losses, step = encoding._store, HeldOut.losses, 0
    loss, save_state, drawing = Objective.loss, outputs.save_state, outputs._drawn
    export_files = outputs.export_files
    all_reduce, calls, num_bytes = dist.all_reduce, 0, 0

    def seen_all_reduce(tensor: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls, num_bytes
        calls, num_bytes = calls + 1, num_bytes + tensor.nbytes
        return all_reduce(tensor, *arguments, **options)

    travels = {"all_gather_single": [0, 0], "reduce_scatter_single": [0, 0]}
    originals = {name: getattr(dist, name) for name in travels}

    def seen_travel(name: str) -> Any:
        def travel(*tensors: Any, **options: Any) -> Any:
            both = [*tensors, *(value for value in options.values() if hasattr(value, "nbytes"))]
            travels[name][0] += 1
            travels[name][1] += max(tensor.nbytes for tensor in both if hasattr(tensor, "nbytes"))
            return originals[name](*tensors, **options)

        return travel

    for name in travels:
        setattr(dist, name, seen_travel(name))

    def seen_gradients(training: Any, *arguments: Any) -> Any:
        for name, (times, size) in travels.items():
            told.travelled.setdefault(name, []).append((times, size))
        place = training.run.ranks.place
        told.added_up.append((calls, num_bytes))
        batches = training.data.batches.at(training.step, hand=place.rank, hands=place.size)
        told.pictures.append([example.path.name for batch, _ in batches for example in batch.examples])
        return gradients(training, *arguments)

    def seen_records(optimizer: Any) -> Any:
        nonlocal step
        found = records(optimizer)
        values = [_numbers(p).numpy().tobytes() for group in optimizer.param_groups for p in group["params"]]
        told.held = sum(_here(p).numel() for group in optimizer.param_groups for p in group["params"])
        told.d.append([group.applied_d for group in found])
        told.weights.append(hashlib.sha256(b"".join(values)).hexdigest())
        if events.get("stop") == (told.rank, step):
            signal.raise_signal(signal.SIGTERM)
        if events.get("kill") == (told.rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        if events.get("freeze") == (told.rank, step):
            os.kill(os.getpid(), signal.SIGSTOP)
        step += 1
        return found

    def seen_losses(*arguments: Any, **share: Any) -> Any:
        if events.get("fail to validate") == (told.rank, step):
            raise RuntimeError("out of memory")
        found = losses(*arguments, **share)
        told.validated.append(sorted(found or []))
        return found

    def seen_store(path: Any, *arguments: Any) -> None:
        told.encoded.append(path.name)
        store(path, *arguments)

    def seen_drawing(*arguments: Any) -> Any:
        if events.get("fail to draw") == (told.rank, step - 1):
            raise RuntimeError("out of memory")
        pictures = drawing(*arguments)
        told.drawn.append(len(pictures))
        return pictures

    def seen_loss(*arguments: Any) -> Any:
        if events.get("no memory") == (told.rank, step - 1):
            del events["no memory"]
            raise torch.OutOfMemoryError("CUDA out of memory")
        if events.get("freeze in a step") == (told.rank, step - 1):
            os.kill(os.getpid(), signal.SIGSTOP)
        found = loss(*arguments)
        is_due = "nan" in events and told.rank == events["nan"][0] and step >= events["nan"][1]
        return found * float("nan") if is_due else found

    def seen_save(folder: Any, number: int, numbers: Any, **options: Any) -> Any:
        if events.get("full disk") == (told.rank, number):
            with numbers.handed_out():
                raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        if events.get("slow disk") == (told.rank, number):
            time.sleep(SLOW_S)
        return save_state(folder, number, numbers, **options)

    def seen_later(optimizer: Any) -> Any:
        found = seen_records(optimizer)
        return lambda: found

    def seen_export(*arguments: Any, whole: Any = None, **options: Any) -> Any:
        if whole is not None and events.get("full disk for weights", (-1, 0))[0] == told.rank:
            take, left = whole.take, iter(range(events["full disk for weights"][1]))

            def taken(name: str) -> Any:
                if next(left, None) is None:
                    raise OSError(errno.ENOSPC, "No space left on device", name)
                return take(name)

            whole.take = taken
        return export_files(*arguments, whole=whole, **options)

    settling.group_records, settling.group_records_later = seen_records, seen_later
    outputs.export_files = seen_export
    fit.gradients, encoding._store = seen_gradients, seen_store
    outputs._drawn = seen_drawing
    HeldOut.losses = seen_losses  # type: ignore[method-assign]
    dist.all_reduce, Objective.loss, outputs.save_state = seen_all_reduce, seen_loss, seen_save  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
        dist.all_reduce, Objective.loss, outputs.save_state = all_reduce, loss, save_state  # type: ignore[method-assign]
        settling.group_records, settling.group_records_later, fit.gradients = records, later, gradients
        outputs._drawn, outputs.export_files = drawing, export_files
        encoding._store, HeldOut.losses = store, losses  # type: ignore[method-assign]
