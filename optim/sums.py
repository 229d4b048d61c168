"""Prodigy's sums at the end of a step: each parameter's, over all ranks, as they enter its group's."""

import torch
from torch import Tensor

from optim.formulas.numbers import Coefficients, Numbers
from optim.formulas.prodigy import speed_sums
from optim.ranks import sharding
from optim.settings import Settings
from optim.steps.stacks import Stack


def sum_up(
    sums: Tensor,
    used: list[Stack],
    now: Numbers,
    settings: Settings,
    coefficients: Tensor,
    all_finite: Tensor,
    done: set[int],
) -> None:
    """Fills `sums`, float64 (parameters, NUM_SUMS), zeros before, from the stacks that took part in the step.

    coefficients: the step's, float32 (coefficients, groups). all_finite: bool, 0-dim, whether all gradients were
        finite. done: the parameters that had a gradient.
    """
    for stack in used:
        sums.index_copy_(0, stack.indices_here, stack.sums)
    sharding.reduce_sums(sums, used)
    if settings.use_speed:
        for stack in used:
            _finish_speed(sums, stack, now, coefficients, all_finite, done)
    else:
        # as upstream, where |s|_1 of each tensor is a bfloat16
        sums[:, 1].copy_(sums[:, 1].to(torch.bfloat16))


def _finish_speed(
    sums: Tensor, stack: Stack, now: Numbers, coefficients: Tensor, all_finite: Tensor, done: set[int]
) -> None:
    """SPEED's sums are ratios of each tensor's own averages."""
    if stack.norms is None:
        return
    group = stack.kind.group
    moved = torch.tensor([index in done for index in stack.indices], device=stack.indices_here.device)
    lam = coefficients[Coefficients._fields.index("lam"), group].to(stack.sums.dtype)
    learns = moved & all_finite & (lam > 0)
    num = speed_sums(stack.norms, sums[stack.indices_here], now.k[group], lam, learns)
    entry = torch.stack((num, num.new_ones(len(stack.indices)), torch.zeros_like(num)), dim=1)
    sums.index_copy_(0, stack.indices_here, torch.where(learns[:, None], entry, 0.0))


def note_squares(used: list[Stack], now: Numbers, all_finite: Tensor) -> None:
    """Notes how large the groups' gradients were, from the stacks that took part in the step.

    all_finite: bool, 0-dim, whether all gradients were finite; if not, nothing is noted.
    """
    at_zero = [stack for stack in used if stack.kind.starts_at_zero]
    groups = {stack.kind.group for stack in at_zero}
    others = [stack for stack in used if stack.kind.group not in groups]
    square, of_zeros = _squares(used, now), _squares([*at_zero, *others], now)
    now.square.copy_(torch.where(all_finite, square, now.square))
    now.left_zero.copy_(torch.where(all_finite & (of_zeros > 0), 1.0, now.left_zero))


def _squares(stacks: list[Stack], now: Numbers) -> Tensor:
    """Sums of g^2 over each group's stacks: (groups,)."""
    by_group = [[stack.totals for stack in stacks if stack.kind.group == group] for group in range(now.k.numel())]
    zero = torch.zeros((), device=now.k.device)
    return torch.stack([torch.cat(totals).sum() if totals else zero for totals in by_group]).to(now.k)
