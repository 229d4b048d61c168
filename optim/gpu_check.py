"""Whether the kernels of `gpu_kernels.py` make the steps of plain torch on this device, driver and compiler."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optim import gpu, rounding
from optim.passes import Passes
from optim.prodigy import GroupValues, Numbers, begin_step, neutral_table
from optim.settings import Settings
from optim.stacks import Kind, begin_stack, build_stack

NUM_STEPS = 3


def difference(kinds: Sequence[Kind], settings: Settings, device: torch.device) -> float:
    """The mean difference of y and z between the paths after a few steps, relative to their mean move; the largest of
    all kinds. inf where something is not a number."""
    weights = {kind: _values(kind, -1, device) for kind in kinds}
    plain = _stepped(weights, settings, compiled=False)
    compiled = _stepped(weights, settings, compiled=True)
    ratios = []
    for kind, one, two in zip(kinds, plain, compiled, strict=True):
        start = weights[kind].float()
        for found, expected in zip(two, one, strict=True):
            moved = (expected.float() - start).abs().mean()
            ratios.append((found.float() - expected.float()).abs().mean() / moved)
    largest = torch.stack(ratios).max()
    return float(largest.nan_to_num(nan=float("inf")))


def _values(kind: Kind, seed: int, device: torch.device) -> Tensor:
    """Numbers around 0 that come from no generator of anybody's."""
    key = torch.tensor([rounding.signed(rounding.parameter_key(0, seed + 1))], dtype=torch.int32, device=device)
    bits = rounding.random_bits(key, kind.numel, 0)
    return (bits.float() / 2**31).view(kind.shape).to(kind.dtype)


def _stepped(weights: dict[Kind, Tensor], settings: Settings, *, compiled: bool) -> list[tuple[Tensor, Tensor]]:
    """y and z of each kind, on one path."""
    params = [weight.clone() for weight in weights.values()]
    device = params[0].device
    key = rounding.signed(rounding.step_key(settings.seed, 1))
    stacks = [
        build_stack(kind._replace(starts_at_zero=False), [index], [index], [weight], settings)
        for index, (kind, weight) in enumerate(weights.items())
    ]
    passes = Passes(params, stacks, settings, compile_step=False)
    if compiled:
        passes.use_tables(stacks, gpu.Table)
    buffer = Numbers.start(1e-2, device)
    Numbers.of(buffer).k.fill_(100.0)  # past the steps in which a warm-up stands still
    values = {"lr": 1.0, "weight_decay": 0.1, "d0": 1e-2, "d_coef": 1.0}
    group = GroupValues(**{name: buffer.new_full((1,), value) for name, value in values.items()})
    for step in range(NUM_STEPS):
        for stack in stacks:
            begin_stack(stack)
        for index, (p, kind) in enumerate(zip(params, weights, strict=True)):
            p.grad = _values(kind, 1 + index + step * len(params), device)
        table = begin_step(Numbers.of(buffer), group, settings)
        passes.step(list(range(len(params))), table, neutral_table(device), key)
    return [(p, stack.z[0]) for p, stack in zip(params, stacks, strict=True)]
