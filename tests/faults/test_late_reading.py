"""A step may be told when the next one is on its way: nothing else is different. Here on the CPU, where it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdtrain.errors import NotFiniteError
from sdtrain.training.ending.settling import Settling
from tests.faults.conftest import Ran, Run
from tests.faults.test_numbers import bad_gradients


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Settling.__init__

    def made(self: Settling, *given: Any) -> None:
        original(self, *given)
        self.is_late = True

    monkeypatch.setattr(Settling, "__init__", made)


CLOCKS = ("images_per_s", "peak_memory_gib", "seconds")


def lines(ran: Ran) -> list[dict[str, Any]]:
    """What the log says, but for what depends on the clock."""
    read = [json.loads(line) for line in (ran.folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in one.items() if key not in CLOCKS} for one in read]


def told(ran: Ran) -> list[str]:
    return [line for line in ran.text.splitlines() if line.startswith(("step 2:", "step 6:", "note"))]


CHANGES = {"steps": 7, "checkpoint.every": 3, "preview.every": 4, "validation.share": 0.4, "validation.every": 5}


def test_what_is_read_late_is_what_is_read_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Log, notes and states, with a step that is left out and read late, and one that is read at once for its state:
    both name their gradients."""
    with monkeypatch.context() as patch:
        bad_gradients(patch, {2, 6})
        at_once = run(CHANGES | {"name": "once"})
    request.getfixturevalue("late")
    with monkeypatch.context() as patch:
        bad_gradients(patch, {2, 6})
        later = run(CHANGES | {"name": "later"})
    assert lines(later) == lines(at_once)
    assert told(later) == told(at_once) and "but the gradients of 1 of 112 parameters (unet/" in told(later)[0]
    assert len(told(later)) == 2
    assert later.states() == at_once.states()
    for name in ("parameters.safetensors", "optimizer.safetensors"):
        assert later.state(7)[name] == at_once.state(7)[name]


@pytest.mark.usefixtures("late")
def test_too_many_steps_that_are_left_out_end_a_run_that_reads_late_where_they_end_any(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_gradients(monkeypatch, set(range(3, 100)))
    ran = run({"steps": 50})
    assert isinstance(ran.error, NotFiniteError) and str(ran.error).startswith("step 7:")
    assert [line["step"] for line in lines(ran) if "groups" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert ran.states() == ["step-000007"]


@pytest.mark.usefixtures("late")
def test_the_last_step_is_told_when_the_next_one_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtrain.training.computing.objective import Objective

    original, calls = Objective.__call__, 0

    def failing(self: Objective, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("the cable was pulled")
        return original(self, *given)

    monkeypatch.setattr(Objective, "__call__", failing)
    ran = run({"steps": 9})
    assert ran.error is not None and ran.states() == ["step-000003"]
    assert [line["step"] for line in lines(ran) if "groups" in line] == [1, 2, 3]
