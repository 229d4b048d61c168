"""A training state that is written while the training goes on: of its own step, told, tried again, waited for."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

import pytest
import torch
from torch import nn

from optim import ProdigyPlusScheduleFree
from sdtrain import Record
from sdtrain.config.schema import CheckpointConfig
from sdtrain.data.order import Plan
from sdtrain.training import behind, outputs
from sdtrain.training.keeping import states
from sdtrain.training.keeping.states import Background, numbers_of
from sdtrain.training.parameters import Group, Trainable
from sdtrain.training.watching.records import SavedRecord, StepRecord
from tests.faults.conftest import Ran, Run
from tests.faults.test_every_way_out import at_step, raising_at

LARGEST_BYTES = 4 * 2**20


def waiting_for(begun: Event, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let every state wait for an event before it is written; return for each whether it was written behind."""
    written_behind: list[bool] = []

    def slow(*arguments: Any, original: Callable[..., Path] = outputs.save_state, **named: Any) -> Path:
        written_behind.append(current_thread() is not main_thread())
        assert begun.wait(60)
        return original(*arguments, **named)

    monkeypatch.setattr(outputs, "save_state", slow)
    return written_behind


def once(step: int, event: Event) -> Callable[[Record], None]:
    """A watcher that lets an event come after a step."""

    def watch(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == step:
            event.set()

    return watch


def test_steps_go_on_while_a_state_is_written(run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    third = Event()
    written_behind = waiting_for(third, monkeypatch)
    ran = run({"checkpoint.every": 1, "checkpoint.keep": 9, "steps": 4}, watchers=[once(1, third)])
    assert written_behind == [True] * 4 and ran.states() == straight.states()
    third.clear()
    ran = run({"name": "slow", "checkpoint.every": 2, "checkpoint.keep": 9}, watchers=[once(3, third)])
    told = [(type(record), record.step) for record in ran.records if isinstance(record, StepRecord | SavedRecord)]
    assert told.index((StepRecord, 3)) < told.index((SavedRecord, 2)), "the third step did not wait"
    assert ran.state(2) == straight.state(2), "the state is that of its own step, not of when it was written"
    assert ran.state(4) == straight.state(4)


def test_a_state_is_the_same_whether_it_is_written_at_once_or_not(run: Run, straight: Ran) -> None:
    ran = run({"checkpoint.every": 1, "checkpoint.keep": 9, "checkpoint.in_background": False})
    assert ran.states() == straight.states()
    assert all(ran.state(step) == straight.state(step) for step in range(1, 5))


def test_a_state_that_could_not_be_written_in_the_background_is_told_and_tried_again(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "TRY_AGAIN_STEPS", 0)
    broken = raising_at(1, OSError(28, "No space left on device"), outputs.save_state)
    monkeypatch.setattr(outputs, "save_state", broken)
    ran = run({"checkpoint.every": 2, "checkpoint.keep": 9})
    assert ran.result is not None and ran.result.finished
    assert ran.text.count("the training state of step 2 could not be saved: OSError: [Errno 28] No space left") == 1
    assert ran.states()[-1] == "step-000004" and "step-000002" not in ran.states()
    assert ran.state(4) == straight.state(4)


def test_the_last_state_is_tried_again_where_the_background_could_not_write_it(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        outputs, "save_state", raising_at(1, OSError(28, "No space left on device"), outputs.save_state)
    )
    ran = run({"checkpoint.every": 4})
    assert ran.result is not None and ran.result.finished
    assert "the training state of step 4 could not be saved" in ran.text
    assert ran.states() == ["step-000004"] and ran.state(4) == straight.state(4)


def test_a_run_that_stops_waits_for_the_state_that_is_written(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Event()
    waiting_for(second, monkeypatch)
    ran = run({"checkpoint.every": 1, "checkpoint.keep": 9}, watchers=[once(2, second), at_step(2, signal.SIGTERM)])
    assert ran.result is not None and ran.result.exit_code == 143
    assert ran.states() == ["step-000001", "step-000002"]
    assert all(ran.state(step) == straight.state(step) for step in (1, 2))


@pytest.mark.parametrize("free", [0, None])
def test_without_memory_for_a_copy_a_state_is_written_at_once(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch, free: int | None
) -> None:
    monkeypatch.setattr(behind, "free_bytes", lambda: free)
    now = Event()
    now.set()
    written_behind = waiting_for(now, monkeypatch)
    ran = run({"checkpoint.every": 1, "checkpoint.keep": 9})
    assert written_behind == [free is None] * 4, "a small state is written behind where nobody knows"
    assert all(ran.state(step) == straight.state(step) for step in range(1, 5))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the highest memory")
def test_a_state_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    """A full state of 160 MiB takes less memory than two of its tensors."""
    parameters = {str(number): nn.Parameter(torch.ones(1024, 1024)) for number in range(20)}
    trainable = Trainable((Group("unet", parameters, 1.0, 0.0, 0),))
    optimizer = ProdigyPlusScheduleFree([{"params": list(parameters.values()), "name": "unet"}])
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    numbers = numbers_of(trainable, optimizer)
    assert numbers.num_bytes > 40 * LARGEST_BYTES
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    states.save_state(tmp_path, 1, numbers, Background("", "", Plan(1, 1), ""), CheckpointConfig())
    assert resident_bytes("VmHWM") - before < 2 * LARGEST_BYTES


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith(name))
