"""When d climbs, when it rests, and when it is fixed.

Source: escape velocity arXiv 2409.20325 (section 4), for "auto".
"""

import torch
from torch import Tensor

from optim.formulas.numbers import GroupValues, Numbers
from optim.settings import Settings

AUTO_GROWTH = 1.02
"""With `prodigy_steps="auto"`, d counts as growing while it gains at least this factor ..."""
AUTO_PATIENCE = 100
"""... within this many steps ..."""
AUTO_SHARE = 0.5
"""... or within this share of the steps for which it grew, whichever is more."""
CLIMB_GROWTH = 1.5
"""d climbs while it gains at least this factor ..."""
CLIMB_PATIENCE = 20
"""... within this many steps: at the limit of growth it takes three."""
REST_PATIENCE = 40
"""d is at rest once it has not gained CLIMB_GROWTH for this many steps ..."""
REST_SHARE = 0.5
"""... and for this share of the steps for which it climbed: d likes to climb once more after 20 or 30 steps."""

FROZEN_WHILE_IT_CLIMBED = 2
"""The mark of a group whose d was fixed, by a number of steps, while it climbed; 1 is that of all others ..."""
FROZEN_FOR_ITS_WEIGHT = 3
"""... but for one whose d was fixed at rest because it has a weight."""


def freeze_by_count(now: Numbers, settings: Settings) -> None:
    """`prodigy_steps` as a number: d is fixed from that step on."""
    if isinstance(settings.prodigy_steps, int) and settings.prodigy_steps > 0:
        due = (now.frozen == 0) & (now.k >= settings.prodigy_steps)
        mark = torch.where(is_climbing(now), float(FROZEN_WHILE_IT_CLIMBED), 1.0)
        now.frozen.copy_(torch.where(due, mark, now.frozen))


def freeze_by_growth(now: Numbers, settings: Settings, learns: Tensor) -> None:
    """`prodigy_steps="auto"`: d is fixed, no sooner than `freeze_after`, once it has grown and then, for 100 steps and
    half as many as it grew for, has not grown by more than 2 % (the escape velocity is reached)."""
    if settings.prodigy_steps != "auto":
        return
    patience = (now.mark_k * AUTO_SHARE).clamp_min(AUTO_PATIENCE)
    resting = learns & (now.mark_k > 1) & (now.k - now.mark_k >= patience) & (now.k >= settings.freeze_after)
    now.frozen.copy_(torch.where(resting, 1.0, now.frozen))


def freeze_weighed(now: Numbers, values: GroupValues, settings: Settings, learns: Tensor) -> None:
    """Fixes the d of groups that have a weight, once it has climbed and is at rest.

    Were it estimated on, in steps of another size, it would undo the weight: a network that moves in smaller steps
    needs more of them until its gradients no longer point away from the start, and d grows as long as they do.
    """
    due = learns & is_weighed(values, settings) & (now.climb_k > 1) & _rests(now, now.k + 1, values, settings)
    now.frozen.copy_(torch.where(due, float(FROZEN_FOR_ITS_WEIGHT), now.frozen))


def mark_growth(now: Numbers, learns: Tensor) -> None:
    """Notes when d last grew: by 2 %, and by half."""
    for factor, mark_d, mark_k in (
        (AUTO_GROWTH, now.mark_d, now.mark_k),
        (CLIMB_GROWTH, now.climb_d, now.climb_k),
    ):
        grew = learns & (now.d > factor * mark_d)
        mark_d.copy_(torch.where(grew, now.d, mark_d))
        mark_k.copy_(torch.where(grew, now.k, mark_k))


def is_climbing(now: Numbers) -> Tensor:
    """Whether each group's d grew by half within the last 20 steps: bool (groups,)."""
    return (now.climb_k > 1) & (now.k - now.climb_k < CLIMB_PATIENCE)


def is_settled(now: Numbers, values: GroupValues, settings: Settings) -> Tensor:
    """Whether each group's d is at rest or fixed, so that its weight and `d_coef` hold: bool (groups,).

    How large a step may be shows only in steps of that size: a network that moves in smaller ones takes its smaller
    moves for a smaller distance. So d is found with steps of weight 1, and only then multiplied.
    """
    return (now.frozen > 0) | _rests(now, now.k, values, settings)


def is_weighed(values: GroupValues, settings: Settings) -> Tensor:
    """Whether each group's step is multiplied by a weight or `d_coef`: bool (groups,). One d for all is one group."""
    weighed = ((values.initial_lr > 0) & (values.initial_lr != 1)) | (values.d_coef != 1)
    return weighed if settings.split_groups else weighed.any().expand_as(weighed)


def _rests(now: Numbers, k: Tensor, values: GroupValues, settings: Settings) -> Tensor:
    """Whether each group's d is at rest at step k: bool (groups,).

    A d that has never grown may only need time; one that a group was given, by a d0 of its own that is above the
    others', is taken for one that was found.
    """
    unmoved = torch.where(values.d0 > settings.d0, 0.0, float(AUTO_PATIENCE))
    patience = torch.where(now.climb_k > 1, (now.climb_k * REST_SHARE).clamp_min(REST_PATIENCE), unmoved)
    return k - now.climb_k >= patience
