"""Prodigy's step size d: what the sums say, how it grows, and what a step is made of. When it stops: `freezing.py`.

Sources: Prodigy arXiv 2306.06101 (algorithm 1), Schedule-Free arXiv 2405.15682 (eq. 8 and the weights c), refined
averaging arXiv 2507.09846, RAdam arXiv 1908.03265 (eq. 7).
"""

import torch
from torch import Tensor

from optim.formulas.freezing import freeze_by_count, freeze_by_growth, freeze_weighed, is_settled, mark_growth
from optim.formulas.numbers import Coefficients, GroupValues, Numbers
from optim.settings import Settings

LIMIT_OF_GROWTH = 2**0.25
"""With `d_limiter`, d grows by at most this factor per step."""


def mean_over_groups(d: Tensor, active: Tensor, settings: Settings) -> Tensor:
    """The d that is applied: each group's own, or the mean over the groups that take part in the step.

    d: (groups,). active: bool (groups,). Returns (groups,), of which only the active groups' entries have a meaning.
    """
    if not settings.split_groups or settings.split_groups_mean is None:
        return d
    num_active = active.sum()
    match settings.split_groups_mean:
        case "harmonic_mean":
            mean = (torch.where(active, d.reciprocal(), 0.0).sum() / num_active).reciprocal()
        case "geometric_mean":
            mean = (torch.where(active, d.log(), 0.0).sum() / num_active).exp()
        case "mean":
            mean = torch.where(active, d, 0.0).sum() / num_active
    return mean.expand_as(d)


def rectification(k: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """RAdam's factor of the step size at step k, 0 in the first steps, and beta2 of a bias-corrected average."""
    longest = 2 / (1 - beta2) - 1
    power = beta2**k
    length = longest - 2 * k * power / (1 - power)
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return torch.where(length > 4, ratio.clamp_min(0).sqrt(), 0.0), 1 - (1 - beta2) / (1 - power)


def begin_step(now: Numbers, active: Tensor, values: GroupValues, settings: Settings) -> Tensor:
    """The coefficients of a step, from d as it stands: float32 (coefficients, groups).

    Of the numbers only the applied d, c and the frozen marks are written.

    active: bool (groups,), which groups take part: the others are not averaged, and keep their applied d and c.
    """
    beta1 = settings.betas[0]
    freeze_by_count(now, settings)
    factor, beta2_now = _bias_correction(now, settings)
    d, lr, scheduled = now.d, values.lr, values.lr
    if values.any_weighed:
        settled = is_settled(now, values, settings)
        scheduled = torch.where(values.initial_lr > 0, values.lr / values.initial_lr, values.lr)
        lr = torch.where(settled, values.lr, scheduled)
        d = torch.where(settled, now.d * values.d_coef, now.d)
    applied = torch.where(active, mean_over_groups(d, active, settings), now.applied_d)
    dlr = applied * lr * factor
    pace = mean_over_groups(now.d, active, settings) * scheduled * factor
    total = now.weight_sum + pace**2
    weight = torch.where(total > 0, pace**2 / total, 0.0)
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
    now.weight.copy_(torch.where(active, weight, now.weight))
    now.applied_lr.copy_(lr)
    now.pace.copy_(pace)
    return torch.stack([value.to(torch.float32) for value in coefficients])


def _bias_correction(now: Numbers, settings: Settings) -> tuple[Tensor, Tensor]:
    """RAdam's factor of the step size, where asked for, and the beta2 of this step."""
    if settings.use_bias_correction:
        return rectification(now.k, settings.betas[1])
    return torch.ones_like(now.d), torch.full_like(now.d, settings.betas[1])


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
    now.weight_sum.copy_(torch.where(stepped, now.weight_sum + now.pace**2, now.weight_sum))

    learns = all_finite & moved_by_any & (now.frozen == 0)
    previous = now.numerator.clone()
    r = previous * settings.decay_of_sums + torch.where((now.d > values.d0) | (num > 0), num, 0.0)
    now.numerator.copy_(torch.where(learns, r, previous))
    now.peak.copy_(torch.where(learns, torch.maximum(now.peak, r), now.peak))
    grown = _speed(now, previous) if settings.use_speed else _estimate(now, den, values, settings)
    now.d.copy_(torch.where(learns, grown, now.d))
    mark_growth(now, learns)
    freeze_by_growth(now, settings, learns)
    if values.any_weighed:
        freeze_weighed(now, values, settings, learns)
    now.k.add_(all_finite)
    now.skipped.add_(~all_finite)
    now.active.copy_(moved)


def _estimate(now: Numbers, den: Tensor, values: GroupValues, settings: Settings) -> Tensor:
    """Prodigy's d: d_hat = r / den, limited in its growth, taken over as beta4 says; never below d0."""
    target = now.numerator / den
    if settings.d_limiter:
        target = torch.minimum(target, now.d * LIMIT_OF_GROWTH)
    beta4 = settings.decay_of_d
    averaged = abs(beta4) * now.d + (1 - abs(beta4)) * target
    if beta4 == 0:
        new = torch.maximum(now.d, target)
    elif beta4 > 0:
        new = averaged
    else:
        new = torch.where(target < now.d, averaged, target)
    return torch.where(den > 0, torch.maximum(new, values.d0), now.d)


def _speed(now: Numbers, previous: Tensor) -> Tensor:
    """SPEED's d (prodigy-plus-schedule-free 2.0.1): grows with the square root of r's growth while r is at its peak."""
    growth = (now.numerator / previous).clamp_min(0).sqrt().clamp_max(LIMIT_OF_GROWTH)
    rises = (now.numerator >= now.peak) & (now.numerator > 0) & (previous > 0)
    return torch.where(rises, torch.maximum(now.d, now.d * growth), now.d)


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
