"""The compiled step on the CPU makes the steps of the plain path, and one whose factors are 10 % off is noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree
from optim.formulas.numbers import Coefficients, Numbers
from optim.settings import Settings
from optim.steps import cpu
from optim.steps.support import supports
from tests.optim.small_runs import (
    SETTINGS,
    TRIALS,
    build,
    gradient,
    make_larger,
    starts,
    unnoticed_by_trial,
    used_by,
)

pytestmark = pytest.mark.skipif(cpu.unavailable() != "", reason="no working C++ compiler")

TRIED = {name: settings for name, settings in SETTINGS.items() if supports(Settings(**settings))}
TRIED |= {"rounded to the nearest": {"stochastic_rounding": False, "d0": 1e-2}}
DTYPES = [torch.float32, torch.bfloat16]
NUM_STEPS = 20
MUTATED_AT = (4, 9, 17)
ALLOWED = {
    # largest difference of a weight; in bfloat16, where a last bit of float32 tips one now and then, share of the move
    "weights": {torch.float32: 1e-6, torch.bfloat16: 2e-4},
    # relative to the whole tensor
    "second moment": {torch.float32: 1e-5, torch.bfloat16: 1e-5},
    # kept in bfloat16 whatever the weights are in
    "s": {torch.float32: 1e-3, torch.bfloat16: 1e-3},
    # r, of each group; d, in which each tensor's |s|_1 is a bfloat16
    "r": {torch.float32: 1e-4, torch.bfloat16: 1e-4},
    "d": {torch.float32: 5e-3, torch.bfloat16: 5e-3},
}

State = dict[str, list[Tensor]]


def test_all_coefficients_but_those_of_the_first_moment_are_used() -> None:
    used = {name for settings in TRIED.values() for name in used_by(Settings(**settings))}
    assert set(Coefficients._fields) - used == {"beta1", "gain"}


def state_of(params: list[nn.Parameter], optimizer: ProdigyPlusScheduleFree) -> State:
    """Copies, by what they are."""
    kept = optimizer._kept
    found: State = {"weights": [p.detach().clone() for p in params], "second moment": [], "s": []}
    for stack in kept.stacks:
        for name, tensor in stack.tensors().items():
            kind = "weights" if name == "z" else "s" if name == "s" else "second moment"
            if name != "p0":
                found[kind].append(tensor.clone())
    return {**found, "numbers": [kept.numbers.clone()]}


def go_back_to(state: State, params: list[nn.Parameter], optimizer: ProdigyPlusScheduleFree, steps: int) -> None:
    """Puts the state of another optimizer, of the same stacks, in the place of this one's."""
    kept, given = optimizer._kept, {kind: iter(tensors) for kind, tensors in state.items()}
    for p in params:
        p.data.copy_(next(given["weights"]))
    for stack in kept.stacks:
        for name, tensor in stack.tensors().items():
            if name != "p0":
                tensor.copy_(next(given["weights" if name == "z" else "s" if name == "s" else "second moment"]))
    kept.numbers.copy_(state["numbers"][0])
    kept.steps = steps


def total(tensors: list[Tensor]) -> float:
    return sum(float(t.double().abs().sum()) for t in tensors)


def differences(before: State, found: State, expected: State, dtype: torch.dtype) -> dict[str, float]:
    """In parts of what is allowed."""
    apart = {kind: [a.float() - b.float() for a, b in zip(found[kind], expected[kind], strict=True)] for kind in found}
    result = {}
    if dtype == torch.float32:
        result["weights"] = max(float(t.abs().max()) for t in apart["weights"])
    else:
        moved = [a.float() - b.float() for a, b in zip(expected["weights"], before["weights"], strict=True)]
        result["weights"] = total(apart["weights"]) / max(total(moved), 1e-30)
    for kind in ("second moment", "s"):
        result[kind] = total(apart[kind]) / max(total(expected[kind]), 1e-30)
    one, two = (Numbers.of(state["numbers"][0]) for state in (found, expected))
    result["r"] = float(((one.numerator - two.numerator).abs() / two.numerator.abs().clamp_min(1e-30)).max())
    result["d"] = float(((one.d - two.d).abs() / two.d).max())
    return {kind: value / ALLOWED[kind][dtype] for kind, value in result.items()}


def step_side_by_side(
    settings: dict[str, Any], dtype: torch.dtype, compare: Callable[[int, Callable[[], dict[str, float]]], None]
) -> None:
    """A run of the plain path, and at each step one of the compiled path from the very same state.

    compare: called with the number of the step and a function that makes the compiled step (once more) and returns the
        differences.
    """
    plain, optimizer = build(starts(), False, dtype, **settings)
    params, compiled = build(starts(), True, dtype, **settings)
    for step in range(NUM_STEPS):
        before = state_of(plain, optimizer)
        grads = [gradient(p.detach(), step, index).to(dtype) for index, p in enumerate(plain)]
        for p, q, g in zip(plain, params, grads, strict=True):
            p.grad, q.grad = g, g
        optimizer.step()
        expected = state_of(plain, optimizer)
        if step == 0:
            compiled.step()  # there are no stacks before
            continue

        def once_more(before: State = before, expected: State = expected, step: int = step) -> dict[str, float]:
            go_back_to(before, params, compiled, step)
            compiled.step()
            assert compiled._stepper.tables != [], "the compiled step must be what is tried"
            return differences(before, state_of(params, compiled), expected, dtype)

        compare(step, once_more)
    for p, start in zip(plain, starts(), strict=True):
        assert (p.detach().float() - start).abs().max() > 1e-4, "a test in which nothing moves shows nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TRIED)
def test_the_compiled_path_follows_the_plain_one(name: str, dtype: torch.dtype) -> None:
    def compare(step: int, once_more: Callable[[], dict[str, float]]) -> None:
        for kind, difference in once_more().items():
            assert difference <= 1, f"{kind} at step {step}: {difference:.3g} of what is allowed"

    step_side_by_side(TRIED[name], dtype, compare)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TRIED)
def test_a_coefficient_that_is_10_percent_off_is_noticed(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, with each coefficient in turn changed on its way to the library: the test above must fail then."""
    largest: dict[str, float] = {}
    advance = cpu.Call.advance

    def compare(step: int, once_more: Callable[[], dict[str, float]]) -> None:
        if step in MUTATED_AT:
            for coefficient in used_by(Settings(**TRIED[name])):
                monkeypatch.setattr(cpu.Call, "advance", make_larger(advance, coefficient))
                found = max(once_more().values())
                largest[coefficient] = max(largest.get(coefficient, 0.0), found)
            monkeypatch.setattr(cpu.Call, "advance", advance)
        once_more()

    step_side_by_side(TRIED[name], dtype, compare)
    unnoticed = {coefficient: value for coefficient, value in largest.items() if value <= 1}
    assert largest.keys() == set(used_by(Settings(**TRIED[name])))
    assert not unnoticed


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TRIALS)
def test_the_trial_on_copies_notices_it_too(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unnoticed_by_trial(cpu, name, [(16, 640), (300, 7, 3, 3), (2000,)], dtype, monkeypatch) == ["none"]


@pytest.mark.parametrize(
    "shape", [(300, 1300), (1300, 30), (90, 40, 3, 3), (40, 90, 3, 3), (33, 64, 5, 5), (5, 8000), (70_000,)]
)
@pytest.mark.parametrize("eps", [None, 1e-8])
def test_tensors_of_several_blocks_follow_the_plain_path(shape: tuple[int, ...], eps: float | None) -> None:
    results = []
    for compile_step in (False, True):
        p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        optimizer = ProdigyPlusScheduleFree([p], d0=1e-3, eps=eps, compile=compile_step)
        for step in range(4):
            p.grad = gradient(p.detach(), step, 0)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-6)


def test_the_compiled_path_gives_the_same_bits_on_any_number_of_threads() -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params, optimizer = build([*starts(), torch.ones(300, 700)], True, weight_decay=0.1)
        for step in range(3):
            for index, p in enumerate(params):
                p.grad = gradient(p.detach(), step, index)
            optimizer.step()
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
