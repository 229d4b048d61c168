"""Tries a compiled step on copies, against plain torch, before it may touch a weight.

A compiler, a driver or a card with which it goes wrong must not cost anybody their work.
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optim.formulas.numbers import Coefficients, GroupValues, Numbers
from optim.formulas.prodigy import begin_step
from optim.settings import Settings
from optim.steps import plain, stacks
from optim.steps.plain import Step
from optim.steps.scratch import Scratch
from optim.steps.stacks import Kind, Stack
from optim.steps.support import Table

NUM_STEPS = 3
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Largest difference to plain torch, in parts of the move. A float32's last bit decides now and then which bfloat16 a
weight is rounded to."""

MakeTable = Callable[[list[Stack], Settings], Table]


def reason_against(kinds: Sequence[Kind], settings: Settings, device: torch.device, make_table: MakeTable) -> str:
    """Why the steps of a table must not be used for such parameters on this device; "" if they agree with plain
    torch's."""
    for dtype, allowed in ALLOWED.items():
        mine = [kind for kind in dict.fromkeys(kinds) if kind.dtype == dtype]
        found = difference(mine, settings, device, make_table)
        if not found < allowed:
            return f"on this device its steps differ from plain torch's by {found:.1g} of a step"
    return ""


@functools.cache
def warn_once(reason: str) -> None:
    """Tells why plain torch is used, once per reason."""
    warnings.warn(f"the optimizer's compiled step is not used, plain torch is: {reason}", stacklevel=3)


def difference(kinds: Sequence[Kind], settings: Settings, device: torch.device, make_table: MakeTable) -> float:
    """How far the paths are apart after a few steps: the largest of all kinds, or inf where something is not a number.

    kinds: all of one dtype, no two of them equal. For y and z it is the mean difference relative to the mean move, for
        the rest of the state and Prodigy's sums relative to their size.
    """
    if not kinds:
        return 0.0
    weights = {kind: _values(kind, 0, device) for kind in kinds}
    expected = _stepped(weights, settings, None)
    found = _stepped(weights, settings, make_table)
    ratios = [torch.zeros((), device=device)]
    for kind, one, two in zip(kinds, found, expected, strict=True):
        start = weights[kind].float()
        for name, value in one.items():
            size = two[name] - start if name in ("y", "z") else two[name]
            tiny = torch.finfo(size.dtype).tiny
            ratios.append(((value - two[name]).abs().mean() / size.abs().mean().clamp_min(tiny)).float())
    largest = torch.stack(ratios).max()
    return float(largest.nan_to_num(nan=float("inf")))


def _values(kind: Kind, number: int, device: torch.device) -> Tensor:
    """Numbers between -0.5 and 0.5 that come from no generator of anybody's: a Weyl sequence."""
    element = torch.arange(kind.numel, dtype=torch.float32, device=device)
    return ((element + 1) * 0.618034 + number * 0.754878).frac().sub(0.5).view(kind.shape).to(kind.dtype)


def _stepped(weights: dict[Kind, Tensor], settings: Settings, make_table: MakeTable | None) -> list[dict[str, Tensor]]:
    """What each kind's parameter and state are after the steps of a table, or of plain torch."""
    params = [weight.clone() for weight in weights.values()]
    device = params[0].device
    built = [
        stacks.build_stack(kind, [index], [index], [weight], settings)
        for index, (kind, weight) in enumerate(weights.items())
    ]
    for stack in built:
        stacks.begin_stack(stack)
    table = make_table(built, settings) if make_table else None
    for number in range(NUM_STEPS):
        for stack in built:
            stacks.begin_stack(stack)
        grads = [_values(kind, 1 + index + number * len(params), device) for index, kind in enumerate(weights)]
        coefficients = _coefficients(settings, device)
        all_finite = torch.ones((), dtype=torch.bool, device=device)
        if table is not None:
            table.measure(list(range(len(params))), params, grads).advance(coefficients, all_finite, number)
            continue
        step = Step(settings, [Coefficients.of(coefficients, 0)], [True], all_finite, number, Scratch(device))
        for stack, p, g in zip(built, params, grads, strict=True):
            plain.measure(stack, slice(0, 1), [g], step.scratch)
            plain.blend_factors(stack, slice(0, 1), step)
            plain.update(stack, slice(0, 1), [p], [g], step, None)
    return [_result(p, stack) for p, stack in zip(params, built, strict=True)]


def _coefficients(settings: Settings, device: torch.device) -> Tensor:
    """Those of a step in the middle of a run, past the steps in which a warm-up stands still."""
    numbers = Numbers.start(1e-2, device)
    Numbers.of(numbers).k.fill_(100.0)
    Numbers.of(numbers).weight_sum.fill_(3e-4)
    decay = 1.0 if settings.weight_decay_by_lr else 1e-2  # a share of the move, not all of it
    values = {"lr": 1.0, "weight_decay": decay, "d0": 1e-2, "d_coef": 1.0, "initial_lr": 1.0}
    group = GroupValues(**{name: numbers.new_full((1,), value) for name, value in values.items()}, any_weighed=False)
    active = torch.ones(1, dtype=torch.bool, device=device)
    return begin_step(Numbers.of(numbers), active, group, settings)


def _result(p: Tensor, stack: Stack) -> dict[str, Tensor]:
    state = {name: value.float() for name, value in stack.state_of(0).items()}
    return {**state, "y": p.float(), "num": stack.sums[0, 0], "den": stack.sums[0, 1]}
