"""What people see of a running optimizer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.formulas.freezing import FROZEN_WHILE_IT_CLIMBED, is_climbing, is_settled
from optim.formulas.numbers import GroupValues, Numbers
from optim.settings import Settings


@dataclass(frozen=True)
class GroupMetrics:
    """What one group is doing, for people to see."""

    name: str
    d: float
    """The group's own estimate of the step size, times `d_coef` once it has stopped climbing."""
    found_d: float
    """The same without `d_coef`: what another optimizer of these parameters may start from."""
    applied_d: float
    """The d its last step was made with: its own, the mean over the groups, or the joint one."""
    lr: float
    effective_lr: float
    """applied d * lr * (1 - beta1 (1 - c)): how far y moved against the update in the last step; lr is without the
    group's weight while d climbs. 0 for a group that took no part."""
    k: int
    """Number of the coming step, from 1."""
    frozen: bool
    """Whether d is fixed (`prodigy_steps`)."""
    skipped: int
    """Steps left out because a gradient was not finite."""
    active: bool
    """Whether any of its parameters had a gradient in the last step: if not, it holds its weights and is in no mean."""
    climbing: bool
    """Whether d has just grown by half (or had, when it was fixed): it is not yet what it is going to be."""
    settled: bool
    """Whether d is at rest or fixed, so that the group's weight and `d_coef` hold."""
    gradient: float
    """The length of the group's gradient in the last step, over all its parameters; 0 where it had none."""
    at_zero: bool
    """Whether parameters of it began at zero, as an adapter's up matrices do, and none of these had a gradient yet."""


def fetching(tensor: Tensor) -> Callable[[], Tensor]:
    """Begins to copy a tensor to the CPU, as it is now; what is returned waits for the copy, if it must, and gives it.

    So a number can be asked for when the next work is on its way, and neither waits for the other.
    """
    if tensor.device.type != "cuda":
        taken = tensor.clone()
        return lambda: taken.cpu()
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def fetched() -> Tensor:
        done.synchronize()
        return copied

    return fetched


def metrics_later(
    groups: list[dict[str, Any]], buffer: Tensor, values: GroupValues, settings: Settings, zeros: set[int]
) -> Callable[[], list[GroupMetrics]]:
    """Begins to read the numbers of all groups (fields, groups) as they are now; what is returned waits for them, once,
    and gives one entry per group.

    zeros: the groups with parameters that began at zero.
    """
    numbers = Numbers.of(buffer)
    marks = torch.stack((is_settled(numbers, values, settings), is_climbing(numbers))).to(buffer)
    read = fetching(torch.cat((buffer, marks)))
    known = [(group["name"], float(group["lr"]), float(group["d_coef"])) for group in groups]
    return lambda: _metrics(read().T.tolist(), known, settings, zeros)


def _metrics(
    columns: list[list[float]], known: list[tuple[str, float, float]], settings: Settings, zeros: set[int]
) -> list[GroupMetrics]:
    result = []
    for index, ((name, lr, d_coef), (*column, settled, climbs)) in enumerate(zip(known, columns, strict=True)):
        now = dict(zip(Numbers._fields, column, strict=True))
        share = 1 - settings.betas[0] * (1 - now["weight"]) if settings.use_schedulefree else 1.0
        frozen = now["frozen"]
        result.append(
            GroupMetrics(
                name=name,
                d=now["d"] * d_coef if settled else now["d"],
                found_d=now["d"],
                applied_d=now["applied_d"],
                lr=lr,
                effective_lr=now["applied_d"] * now["applied_lr"] * share if now["active"] else 0.0,
                k=int(now["k"]),
                frozen=bool(frozen),
                skipped=int(now["skipped"]),
                active=bool(now["active"]),
                climbing=frozen == FROZEN_WHILE_IT_CLIMBED if frozen else bool(climbs),
                settled=bool(settled),
                gradient=math.sqrt(now["square"]) if now["active"] else 0.0,
                at_zero=index in zeros and not now["left_zero"],
            )
        )
    return result
