"""Prodigy's step size d: what the sums say, how it grows, when it stops.

Sources: Prodigy arXiv 2306.06101 (algorithm 1), Schedule-Free arXiv 2405.15682 (eq. 8 and the weights c), refined
averaging arXiv 2507.09846, RAdam arXiv 1908.03265 (eq. 7), escape velocity arXiv 2409.20325 (section 4).

All numbers of all groups live in one float64 tensor on the device, one column per group, so that the host never has to
wait for one of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optim.settings import Settings

SLICE_P = 11
"""Prodigy's sums run over every 11th element of the flattened tensor."""

LIMIT_OF_GROWTH = 2**0.25
"""With `d_limiter`, d grows by at most this factor per step."""
AUTO_GROWTH = 1.02
"""With `prodigy_steps="auto"`, d counts as growing while it gains at least this factor ..."""
AUTO_PATIENCE = 100
"""... within this many steps ..."""
AUTO_SHARE = 0.5
"""... or within this share of the steps for which it grew, whichever is more."""


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a group's numbers and sums: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Numbers(NamedTuple):
    """The numbers of all groups, each float64 (groups,); views of one buffer (len(Numbers._fields), groups)."""

    k: Tensor  # the number of the coming step, from 1
    d: Tensor
    numerator: Tensor  # r
    peak: Tensor  # the largest r so far (SPEED)
    weight_sum: Tensor  # W
    weight: Tensor  # c of the last step
    applied_d: Tensor  # D of the last step
    mark_d: Tensor  # d when it last grew by more than 2 % ("auto")
    mark_k: Tensor  # and the step of that
    frozen: Tensor  # 1 once d is fixed
    skipped: Tensor  # steps left out because a gradient was not finite

    @staticmethod
    def of(buffer: Tensor) -> "Numbers":
        """Names for the rows of `buffer`; writing to them writes to it."""
        return Numbers(*buffer.unbind(0))

    @staticmethod
    def start(d0: float, device: torch.device) -> Tensor:
        """The column (fields, 1) of a group that has taken no step."""
        first = {"k": 1.0, "d": d0, "applied_d": d0, "mark_d": d0, "mark_k": 1.0}
        return torch.tensor(
            [[first.get(name, 0.0)] for name in Numbers._fields], dtype=exact_dtype(device), device=device
        )


class Coefficients(NamedTuple):
    """What the elementwise part of a step multiplies by: 0-dim float32 tensors of one group, or rows (groups,) of all.

    The compiled steps are handed them in this order.
    """

    d: Tensor
    beta1: Tensor
    gain: Tensor  # 1 - beta1
    beta2: Tensor
    square: Tensor  # (1 - beta2) d^2
    lam: Tensor  # d^2 / sqrt(d0), 0 where d is frozen
    beta3: Tensor
    dlr: Tensor
    weight: Tensor  # c
    y_share: Tensor  # 1 - beta1 (1 - c): the part of z's step that y takes
    decay: Tensor  # weight decay that joins the update
    decay_apart: Tensor  # weight decay that is not scaled by the step size
    d_eps: Tensor

    @staticmethod
    def of(rows: Tensor, group: int) -> "Coefficients":
        """The coefficients of one group. rows: (coefficients, groups)."""
        return Coefficients(*rows[:, group].unbind(0))


NO_OP = {"beta1": 1.0, "beta2": 1.0, "beta3": 1.0, "d": 1.0, "d_eps": 1.0, "y_share": 1.0}
"""Coefficients (0 for the others) of a no-op step: with a gradient of zeros, y, z and all state keep their bits."""


def no_op_coefficients(device: torch.device) -> Tensor:
    """Coefficients of a no-op step, float32 (coefficients, 1), for where a gradient is not finite."""
    return torch.tensor([[NO_OP.get(name, 0.0)] for name in Coefficients._fields], device=device)


@dataclass(frozen=True)
class GroupValues:
    """The settings of the groups on the device, each float64 (groups,)."""

    lr: Tensor
    weight_decay: Tensor
    d0: Tensor
    d_coef: Tensor


def mean_over_groups(d: Tensor, settings: Settings) -> Tensor:
    """The d that is applied: each group's own, or the mean over the groups; (groups,) to (groups,)."""
    if not settings.split_groups or settings.split_groups_mean is None:
        return d
    match settings.split_groups_mean:
        case "harmonic_mean":
            mean = d.reciprocal().mean().reciprocal()
        case "geometric_mean":
            mean = d.log().mean().exp()
        case "mean":
            mean = d.mean()
    return mean.expand_as(d)


def rectification(k: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """RAdam's factor of the step size at step k, 0 in the first steps, and beta2 of a bias-corrected average."""
    longest = 2 / (1 - beta2) - 1
    power = beta2**k
    length = longest - 2 * k * power / (1 - power)
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return torch.where(length > 4, ratio.clamp_min(0).sqrt(), 0.0), 1 - (1 - beta2) / (1 - power)


def freeze_by_count(now: Numbers, settings: Settings) -> None:
    """`prodigy_steps` as a number: d is fixed from that step on."""
    if isinstance(settings.prodigy_steps, int) and settings.prodigy_steps > 0:
        now.frozen.copy_(torch.maximum(now.frozen, (now.k >= settings.prodigy_steps).to(now.frozen.dtype)))


def begin_step(now: Numbers, values: GroupValues, settings: Settings) -> Tensor:
    """The coefficients of a step, from d as it stands: float32 (coefficients, groups).

    Of the numbers only the applied d, c and the frozen marks are written.
    """
    beta1 = settings.betas[0]
    freeze_by_count(now, settings)
    applied = mean_over_groups(now.d, settings)
    dlr, beta2_now = _step_size(now, applied, values, settings)
    total = now.weight_sum + dlr**2
    weight = torch.where(total > 0, dlr**2 / total, 0.0)
    if settings.schedulefree_c > 0:
        weight = (weight * ((1 - beta1) * settings.schedulefree_c)).clamp_max(1.0)
    learns = now.frozen == 0
    zero = torch.zeros_like(now.d)
    coefficients = Coefficients(
        d=now.d,
        beta1=torch.full_like(now.d, beta1),
        gain=torch.full_like(now.d, 1 - beta1),
        beta2=beta2_now,
        square=(1 - beta2_now) * now.d**2,
        lam=torch.where(learns, now.d**2 / values.d0.sqrt(), zero),
        beta3=torch.where(learns, settings.decay_of_sums, 1.0),
        dlr=dlr,
        weight=weight,
        y_share=1 - beta1 * (1 - weight),
        decay=values.weight_decay if settings.weight_decay_by_lr else zero,
        decay_apart=zero if settings.weight_decay_by_lr else values.weight_decay,
        d_eps=now.d * (settings.eps or 0.0),
    )
    now.applied_d.copy_(applied)
    now.weight.copy_(weight)
    return torch.stack([value.to(torch.float32) for value in coefficients])


def _step_size(now: Numbers, applied: Tensor, values: GroupValues, settings: Settings) -> tuple[Tensor, Tensor]:
    """The applied d times lr, with RAdam's factor where asked for, and the beta2 of this step."""
    dlr = applied * values.lr
    beta2 = torch.full_like(dlr, settings.betas[1])
    if settings.use_bias_correction:
        factor, beta2 = rectification(now.k, settings.betas[1])
        dlr = dlr * factor
    return dlr, beta2


def end_step(
    now: Numbers, sums: Tensor, moved: Tensor, values: GroupValues, settings: Settings, all_finite: Tensor
) -> None:
    """Writes d of the next step, from the sums of this one, and the counts.

    sums: float64 (groups, 2), num and den of each group. moved: bool (groups,), which groups had any gradient; a group
        that had none keeps all of its numbers but the count of steps. all_finite: bool, 0-dim, whether all gradients
        were finite; if not, that is counted and nothing else changes.
    """
    num, den = sums.unbind(1)
    if not settings.split_groups:
        num, den = num.sum().expand_as(num), den.sum().expand_as(den)
        moved_by_any = moved.any().expand_as(moved)
    else:
        moved_by_any = moved
    stepped = all_finite & moved
    dlr, _ = _step_size(now, now.applied_d, values, settings)
    now.weight_sum.copy_(torch.where(stepped, now.weight_sum + dlr**2, now.weight_sum))

    learns = all_finite & moved_by_any & (now.frozen == 0)
    previous = now.numerator.clone()
    r = previous * settings.decay_of_sums + torch.where((now.d > values.d0) | (num > 0), num, 0.0)
    now.numerator.copy_(torch.where(learns, r, previous))
    now.peak.copy_(torch.where(learns, torch.maximum(now.peak, r), now.peak))
    grown = _speed(now, previous, values) if settings.use_speed else _estimate(now, den, values, settings)
    now.d.copy_(torch.where(learns, grown, now.d))
    _freeze_by_growth(now, settings, learns)
    now.k.add_(all_finite)
    now.skipped.add_(~all_finite)


def _estimate(now: Numbers, den: Tensor, values: GroupValues, settings: Settings) -> Tensor:
    """Prodigy's d: d_hat = r / den, limited in its growth, taken over as beta4 says; never below d0."""
    d_hat = now.numerator / den
    if settings.d_limiter:
        d_hat = torch.minimum(d_hat, now.d * LIMIT_OF_GROWTH)
    target = d_hat * values.d_coef
    beta4 = settings.decay_of_d
    averaged = abs(beta4) * now.d + (1 - abs(beta4)) * target
    if beta4 == 0:
        new = torch.maximum(now.d, target)
    elif beta4 > 0:
        new = averaged
    else:
        new = torch.where(target < now.d, averaged, target)
    return torch.where(den > 0, torch.maximum(new, values.d0), now.d)


def _speed(now: Numbers, previous: Tensor, values: GroupValues) -> Tensor:
    """SPEED's d (prodigy-plus-schedule-free 2.0.1): grows with the square root of r's growth while r is at its peak."""
    growth = (now.numerator / previous).clamp_min(0).sqrt().clamp_max(LIMIT_OF_GROWTH)
    rises = (now.numerator >= now.peak) & (now.numerator > 0) & (previous > 0)
    return torch.where(rises, torch.maximum(now.d, now.d * growth * values.d_coef**0.125), now.d)


def _freeze_by_growth(now: Numbers, settings: Settings, learns: Tensor) -> None:
    """`prodigy_steps="auto"`: d is fixed once it has grown and then, for 100 steps and half as many as it grew for, has
    not grown by more than 2 % (the escape velocity of arXiv 2409.20325 is reached)."""
    if settings.prodigy_steps != "auto":
        return
    grew = learns & (now.d > AUTO_GROWTH * now.mark_d)
    now.mark_d.copy_(torch.where(grew, now.d, now.mark_d))
    now.mark_k.copy_(torch.where(grew, now.k, now.mark_k))
    patience = (now.mark_k * AUTO_SHARE).clamp_min(AUTO_PATIENCE)
    resting = learns & (now.mark_k > 1) & (now.k - now.mark_k >= patience)
    now.frozen.copy_(torch.where(resting, 1.0, now.frozen))


def speed_sums(norms: Tensor, sums: Tensor, k: Tensor, lam: Tensor, learns: Tensor) -> Tensor:
    """What each tensor adds to num under SPEED, once its averages have taken in this step: (tensors,).

    norms: float64 (tensors, 3), changed in place: averaged <g, p0 - z>, largest |p0 - z|_1 and |p0 - z|_2 so far.
    sums: float64 (tensors, 3): <g, p0 - z>, |p0 - z|_1, |p0 - z|_2 squared of this step. k, lam: 0-dim, of the group.
    learns: bool (tensors,).
    """
    dot, l1, l2 = norms.unbind(1)
    beta = 1 - k**-0.75
    new_dot = torch.where(l1 == 0, sums[:, 0], dot * beta + sums[:, 0] * (1 - beta))
    new = torch.stack((new_dot, torch.maximum(l1, sums[:, 1]), torch.maximum(l2, sums[:, 2].sqrt())), dim=1)
    new[:, 1:].clamp_(min=1e-8)
    norms.copy_(torch.where(learns[:, None], new, norms))
    dot, l1, l2 = norms.unbind(1)
    return lam / (1 + l2) ** 2 * dot / l1.clamp_min(1e-8)
