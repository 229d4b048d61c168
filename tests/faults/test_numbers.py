"""Losses and gradients that are not finite: nothing is changed, it is told and written, and five in a row end a run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load

from sdtrain.errors import NotFiniteError
from sdtrain.training import fit
from sdtrain.training.computing.objective import Objective
from sdtrain.training.ending.guard import backward
from sdtrain.training.optimizers import build_optimizer
from tests.faults.conftest import Ran, Run


def log(ran: Ran) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (ran.folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "groups" in line]


def bad_gradients(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = math.nan) -> None:
    """In these steps one gradient gets a number that is not finite, with a finite loss."""
    calls = 0

    def poisoned(loss: torch.Tensor, scale: float) -> None:
        nonlocal calls
        calls += 1
        backward(loss, scale)
        if calls in steps:
            next(p for p in trained if p.grad is not None).grad[0] = value  # type: ignore[index]

    trained: list[torch.nn.Parameter] = []

    def build(trainable: Any, config: Any) -> Any:
        trained[:] = trainable.named_parameters().values()
        return build_optimizer(trainable, config)

    monkeypatch.setattr(fit, "backward", poisoned)
    monkeypatch.setattr(fit, "build_optimizer", build)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_told_written_and_counted(
    run: Run, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    bad_gradients(monkeypatch, {2, 4}, value)
    ran = run({"checkpoint.every": 1, "checkpoint.keep": 9, "steps": 5})
    lines = log(ran)
    assert [line.get("skipped", False) for line in lines] == [False, True, False, True, False]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert len(lines[1]["pictures"]) == 2 and all(path.endswith(".png") for path in lines[1]["pictures"])
    assert "step 2: the loss is" in ran.text and "but the gradients of 1 of 112 parameters (unet/" in ran.text
    assert f"so nothing was changed; pictures in this step: {', '.join(lines[1]['pictures'])}" in ran.text
    assert "left out" in ran.text and "2 of 5 steps: loss or gradients were not finite" in ran.text
    assert ran.states() == ["step-000001", "step-000003", "step-000005"], "a state is saved once a step is taken"


def test_a_step_with_a_bad_gradient_changes_no_weight(run: Run, monkeypatch: pytest.MonkeyPatch, straight: Ran) -> None:
    bad_gradients(monkeypatch, {3})
    ran = run({"steps": 3})
    assert ran.state(3)["parameters.safetensors"] == straight.state(2)["parameters.safetensors"]


@pytest.mark.parametrize(
    "kind", [{}, {"method": {"kind": "full"}, "memory.fused_back_pass": True}], ids=["lora", "fused"]
)
@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_an_infinite_loss_with_finite_gradients_changes_no_weight(
    run: Run, monkeypatch: pytest.MonkeyPatch, loss: float, kind: dict[str, Any]
) -> None:
    original = Objective.__call__
    plain = run(kind | {"steps": 1, "name": "plain"})
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", lambda self, *given: original(self, *given) + loss)
        ran = run(kind | {"name": "plain", "steps": 2}, resume=True)
    assert ran.state(2)["parameters.safetensors"] == plain.state(1)["parameters.safetensors"]
    assert log(ran)[1]["loss"] is None and log(ran)[1]["skipped"]
    assert f"step 2: the loss is {loss}, so nothing was changed" in ran.text


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_five_in_a_row_end_the_run_with_exit_code_4_and_no_good_state_makes_room(
    run: Run, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run({"steps": 2, "checkpoint.every": 1})
    with monkeypatch.context() as patch:
        if what == "gradients":
            bad_gradients(patch, set(range(100)))
        else:
            original = Objective.__call__
            patch.setattr(Objective, "__call__", lambda self, *given: original(self, *given) * math.nan)
        ran = run({"steps": 50, "checkpoint.every": 1}, resume=True)
    assert isinstance(ran.error, NotFiniteError) and ran.error.exit_code == 4
    assert ran.error.problems[0].where == what and "5 times in a row" in str(ran.error)
    assert [line["step"] for line in log(ran)] == [1, 2, 3, 4, 5, 6, 7], "the last line is of the step that is named"
    assert str(ran.error).startswith("step 7:")
    assert ran.states() == ["step-000001", "step-000002", "step-000007"]
    assert f"to go on from before, delete {ran.folder}/checkpoints/step-000007" in ran.text
    assert ran.state(7)["parameters.safetensors"] == ran.state(2)["parameters.safetensors"]


def test_a_good_step_begins_the_count_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bad_gradients(monkeypatch, set(range(1, 20)) - {5, 10})
    ran = run({"steps": 13})
    assert ran.result is not None and ran.result.finished
    assert ran.text.count("so nothing was changed") == 10, "further ones stand in the log alone"
    assert "11 of 13 steps: loss or gradients were not finite" in ran.text


def test_in_a_fused_backward_each_weight_is_wholly_taken_or_wholly_left(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law of a fused backward: a gradient that is not finite is met after others have moved, which stay moved."""
    fused = {"method": {"kind": "full"}, "memory.fused_back_pass": True}
    good = run(fused | {"name": "good", "steps": 2, "checkpoint.every": 1})
    run(fused | {"name": "bad", "steps": 1})
    marked: list[str] = []

    def build(trainable: Any, config: Any) -> Any:
        name, parameter = list(trainable.named_parameters().items())[150]
        marked.append(name)
        parameter.register_hook(lambda grad: grad * math.nan)
        return build_optimizer(trainable, config)

    monkeypatch.setattr(fit, "build_optimizer", build)
    ran = run(fused | {"name": "bad", "steps": 2}, resume=True)
    before, taken, found = (
        load(state["parameters.safetensors"]) for state in (good.state(1), good.state(2), ran.state(2))
    )
    stays = {name for name in found if torch.equal(found[name], before[name])}
    moved = {name for name in found if torch.equal(found[name], taken[name])}
    assert stays | moved == set(found)
    assert marked[0] in stays - moved and moved - stays
    assert log(ran)[1]["skipped"]
    assert "in a fused backward the weights that had moved before it was met stay moved" in ran.text


def test_backward_gives_the_bits_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (torch.linspace(-3, 3, 50, requires_grad=True) for _ in range(2))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return 0.3 * (x.sin() * x.exp()).square().mean()

    backward(loss(ours))
    loss(theirs).backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
