"""What people see of a running optimizer."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optim.formulas.prodigy import CLIMB_PATIENCE, FROZEN_WHILE_IT_CLIMBED, Numbers
from optim.settings import Settings


@dataclass(frozen=True)
class GroupMetrics:
    """What one group is doing, for people to see."""

    name: str
    d: float
    """The group's own estimate of the step size, times `d_coef` once it has stopped climbing."""
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


def metrics_of(groups: list[dict[str, Any]], buffer: Tensor, settings: Settings) -> list[GroupMetrics]:
    """One entry per group, from the numbers of all groups (fields, groups); waits for the device, once."""
    result = []
    for group, column in zip(groups, buffer.T.tolist(), strict=True):
        now = dict(zip(Numbers._fields, column, strict=True))
        share = 1 - settings.betas[0] * (1 - now["weight"]) if settings.use_schedulefree else 1.0
        settled = bool(now["frozen"]) or now["k"] - now["climb_k"] >= CLIMB_PATIENCE
        climbing = now["frozen"] == FROZEN_WHILE_IT_CLIMBED or (not settled and now["climb_k"] > 1)
        result.append(
            GroupMetrics(
                name=group["name"],
                d=now["d"] * float(group["d_coef"]) if settled else now["d"],
                applied_d=now["applied_d"],
                lr=float(group["lr"]),
                effective_lr=now["applied_d"] * now["applied_lr"] * share if now["active"] else 0.0,
                k=int(now["k"]),
                frozen=bool(now["frozen"]),
                skipped=int(now["skipped"]),
                active=bool(now["active"]),
                climbing=climbing,
            )
        )
    return result
