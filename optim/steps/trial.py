"""Whether the kernels of `cuda_kernels.py` make the steps of plain torch on this device, driver and compiler."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.formulas.prodigy import Coefficients, GroupValues, Numbers, begin_step
from optim.settings import Settings
from optim.steps import plain, stacks
from optim.steps.plain import Step
from optim.steps.scratch import Scratch
from optim.steps.stacks import Kind, Stack

NUM_STEPS = 3


def difference(
    kinds: Sequence[Kind], settings: Settings, device: torch.device, make_table: Callable[[list[Stack], Settings], Any]
) -> float:
    """The mean difference of y and z between the paths after a few steps, relative to their mean move; the largest of
    all kinds. inf where something is not a number."""
    weights = {kind: _values(kind, 0, device) for kind in kinds}
    plain = _stepped(weights, settings, None)
    compiled = _stepped(weights, settings, make_table)
    ratios = []
    for kind, one, two in zip(kinds, plain, compiled, strict=True):
        start = weights[kind].float()
        for found, expected in zip(two, one, strict=True):
            moved = (expected.float() - start).abs().mean()
            ratios.append((found.float() - expected.float()).abs().mean() / moved)
    largest = torch.stack(ratios).max()
    return float(largest.nan_to_num(nan=float("inf")))


def _values(kind: Kind, number: int, device: torch.device) -> Tensor:
    """Numbers between -0.5 and 0.5 that come from no generator of anybody's: a Weyl sequence."""
    element = torch.arange(kind.numel, dtype=torch.float32, device=device)
    return ((element + 1) * 0.618034 + number * 0.754878).frac().sub(0.5).view(kind.shape).to(kind.dtype)


def _stepped(
    weights: dict[Kind, Tensor], settings: Settings, make_table: Callable[[list[Stack], Settings], Any] | None
) -> list[tuple[Tensor, Tensor]]:
    """y and z of each kind, with a table's steps, or plain torch's."""
    params = [weight.clone() for weight in weights.values()]
    device = params[0].device
    built = [
        stacks.build_stack(kind._replace(starts_at_zero=False), [index], [index], [weight], settings)
        for index, (kind, weight) in enumerate(weights.items())
    ]
    for stack in built:
        stacks.begin_stack(stack)
    table = make_table(built, settings) if make_table else None
    buffer = Numbers.start(1e-2, device)
    Numbers.of(buffer).k.fill_(100.0)  # past the steps in which a warm-up stands still
    values = {"lr": 1.0, "weight_decay": 0.1, "d0": 1e-2, "d_coef": 1.0}
    group = GroupValues(**{name: buffer.new_full((1,), value) for name, value in values.items()})
    sound = torch.ones((), dtype=torch.bool, device=device)
    for number in range(NUM_STEPS):
        for stack in built:
            stacks.begin_stack(stack)
        grads = [_values(kind, 1 + index + number * len(params), device) for index, kind in enumerate(weights)]
        coefficients = begin_step(Numbers.of(buffer), group, settings)
        if table is not None:
            table.measure(list(range(len(params))), params, grads).advance(coefficients, sound, number)
            continue
        step = Step(settings, [Coefficients.of(coefficients, 0)], [True], sound, number, Scratch(device))
        for stack, p, g in zip(built, params, grads, strict=True):
            plain.measure(stack, slice(0, 1), [g], step.scratch)
            plain.blend_factors(stack, slice(0, 1), step)
            plain.update(stack, slice(0, 1), [p], [g], step, None)
    return [(p, stack.z[0]) for p, stack in zip(params, built, strict=True)]
