"""What people see of a running optimizer."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optim.formulas.prodigy import Numbers
from optim.settings import Settings


@dataclass(frozen=True)
class GroupMetrics:
    """What one group is doing, for people to see."""

    name: str
    d: float
    """The group's own estimate of the step size."""
    applied_d: float
    """The d its last step was made with: its own, the mean over the groups, or the joint one."""
    lr: float
    effective_lr: float
    """applied d * lr * (1 - beta1 (1 - c)): how far y moves against the update in a step."""
    k: int
    """Number of the coming step, from 1."""
    frozen: bool
    """Whether d is fixed (`prodigy_steps`)."""
    skipped: int
    """Steps left out because a gradient was not finite."""


def metrics_of(groups: list[dict[str, Any]], buffer: Tensor, settings: Settings) -> list[GroupMetrics]:
    """One entry per group, from the numbers of all groups (fields, groups); waits for the device, once."""
    result = []
    for group, column in zip(groups, buffer.T.tolist(), strict=True):
        now = dict(zip(Numbers._fields, column, strict=True))
        share = 1 - settings.betas[0] * (1 - now["weight"]) if settings.use_schedulefree else 1.0
        result.append(
            GroupMetrics(
                name=group["name"],
                d=now["d"],
                applied_d=now["applied_d"],
                lr=float(group["lr"]),
                effective_lr=now["applied_d"] * float(group["lr"]) * share,
                k=int(now["k"]),
                frozen=bool(now["frozen"]),
                skipped=int(now["skipped"]),
            )
        )
    return result
