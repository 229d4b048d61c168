"""The step of a stack in torch operations alone, piece by piece; `cpu.py` and `cuda.py` have its fast twins."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.formulas.numbers import Coefficients
from optim.formulas.rounding import random_bits, round_stochastic_
from optim.formulas.schedule_free import advance
from optim.formulas.second_moment import FOUR_OVER_PI, TINY, atan2_update, epsilon_update, factor_roots, rms_divisor
from optim.settings import Settings
from optim.steps.scratch import Scratch, masked, stacked, sums_of_squares
from optim.steps.stacks import Stack


def measure(stack: Stack, piece: slice, grads: list[Tensor], scratch: Scratch) -> None:
    """Writes the sums of g^2 over a piece of the stack: what the factors and the check for finite gradients need."""
    g = stacked(grads, scratch, "g")
    if stack.kind.axes is None or stack.row_now is None or stack.col_now is None:
        stack.totals[piece] = sums_of_squares(g, scratch, "u")
        return
    square = torch.square(g, out=scratch.take("u", *g.shape))
    first, second = (axis + 1 for axis in stack.kind.axes)
    torch.sum(square, dim=first, keepdim=True, out=stack.col_now[piece])
    torch.sum(square, dim=second, keepdim=True, out=stack.row_now[piece])
    stack.totals[piece] = stack.col_now[piece].flatten(1).sum(1)


@dataclass
class Step:
    """What all pieces of a step share."""

    settings: Settings
    by_group: list[Coefficients]
    decays: list[bool]  # per group; False: the host knows that its weight decay is 0
    all_finite: Tensor | None  # as `masked` has it; where False, the coefficients must be those of a no-op
    key: int  # for the rounding
    scratch: Scratch


def blend_factors(stack: Stack, piece: slice, step: Step) -> None:
    """Takes the means of this step's g^2 into R and C, and puts the roots that the update divides by over the sums."""
    if stack.row is None or stack.col is None or stack.kind.axes is None:
        return
    assert stack.row_now is not None and stack.col_now is not None
    c = step.by_group[stack.kind.group]
    first, second = stack.kind.axes
    row, col = stack.row[piece], stack.col[piece]
    for factor, total, axis in ((row, stack.row_now[piece], second), (col, stack.col_now[piece], first)):
        gain = masked(total, step.all_finite) * (c.square / stack.kind.whole[axis])
        factor.copy_(torch.addcmul(gain, factor, c.beta2))
    stack.row_now[piece], stack.col_now[piece] = factor_roots(row.float(), col.float(), second + 1, c.d)


@dataclass
class Piece:
    """A part of a stack in the middle of its step: what the step reads and changes, each float32 (n, *shape).

    They are copies, or the very tensors where these are float32 and contiguous already.
    """

    stack: Stack
    piece: slice
    y: Tensor
    z: Tensor  # or the first moment
    g: Tensor  # only read: it may be the gradient itself
    c: Coefficients
    step: Step

    def scratch(self, name: str) -> Tensor:
        """The step's buffer of that name, float32 (n, *shape)."""
        return self.step.scratch.take(name, *self.g.shape)


def update(
    stack: Stack, piece: slice, params: list[Tensor], grads: list[Tensor], step: Step, divisor: Tensor | None
) -> None:
    """Makes the step of a piece: u, Prodigy's sums, y and z, and everything written back.

    divisor: (n,), StableAdamW's, where it cannot be had from this shard.
    """
    scratch = step.scratch
    y, z, g = stacked(params, scratch, "y"), stack.z[piece], masked(stacked(grads, scratch, "g"), step.all_finite)
    wide_z = z if z.dtype == torch.float32 else scratch.take("z", *z.shape).copy_(z)
    work = Piece(stack, piece, y, wide_z, g, step.by_group[stack.kind.group], step)
    if step.settings.use_schedulefree:
        _update_schedule_free(work, step.settings, divisor)
    else:
        _update_with_moment(work, step.settings, divisor)
    _write_back(work, params, step.settings, step.key)


def sum_of_squared_update(stack: Stack, piece: slice, grads: list[Tensor], step: Step) -> Tensor:
    """This shard's part of |u|^2, (n,), before anything is changed; for StableAdamW on sharded tensors."""
    settings, c = step.settings, step.by_group[stack.kind.group]
    g, z = masked(stacked(grads, step.scratch, "g"), step.all_finite), stack.z[piece].to(torch.float32, copy=True)
    work = Piece(stack, piece, g, z, g, c, step)
    direction = g if settings.use_schedulefree else _moment(work) / c.d
    root, _ = _root(work)
    return sums_of_squares(epsilon_update(direction, root, settings.eps or 0.0), step.scratch, "g")


def _root(work: Piece) -> tuple[Tensor, Tensor | None]:
    """sqrt(v) / d in a scratch buffer, and the new full second moment where nothing is factored."""
    stack, c = work.stack, work.c
    buffer = work.scratch("u")
    if stack.row_now is not None and stack.col_now is not None:
        return torch.mul(stack.row_now[work.piece], stack.col_now[work.piece], out=buffer), None
    assert stack.v is not None
    v = stack.v[work.piece]
    new = (v * c.beta2).addcmul_(work.g * c.square, work.g)
    return torch.sqrt(new, out=buffer).div_(c.d).clamp_min_(TINY), new


def _raw_update(direction: Tensor, work: Piece, settings: Settings) -> tuple[Tensor, float]:
    """u before it is scaled or decayed, in a scratch buffer, and the factor that it is still to be multiplied by.

    The full second moment, where there is one, takes in this step. direction: what u is made of, divided by d.
    """
    stack = work.stack
    root, new = _root(work)
    if new is not None and stack.v is not None:
        stack.v[work.piece].copy_(new)
    if settings.eps is None:
        return atan2_update(direction, root), FOUR_OVER_PI
    return epsilon_update(direction, root, settings.eps), 1.0


def _rms_scaled(u: Tensor, gain: float, work: Piece, settings: Settings, divisor: Tensor | None) -> float | Tensor:
    """The factor that u is still to be multiplied by: `gain`, over StableAdamW's divisor where that is asked for."""
    if not settings.scales_by_rms:
        return gain
    kind = work.stack.kind
    if divisor is None:
        divisor = rms_divisor(sums_of_squares(u, work.step.scratch, "g"), kind.whole.numel())
    return gain / divisor.view(-1, *(1 for _ in kind.shape))


def _prodigy_sums(work: Piece, at: Tensor) -> None:
    """Writes each tensor's part of num and den. at: where the step starts (z, or the weights without Schedule-Free)."""
    stack, kind, c = work.stack, work.stack.kind, work.c
    if stack.s is None and stack.norms is None:
        return
    g, here = kind.sliced(work.g.flatten(1)), kind.sliced(at.flatten(1))
    moved = here if stack.p0 is None else here - stack.p0[work.piece]
    sums = stack.sums[work.piece]
    dot = (g * moved).sum(1)
    if stack.s is not None:
        s = stack.s[work.piece]
        wide = s.float()
        # as upstream: each of the two operations rounds to bfloat16
        wide.copy_(s.copy_(wide.mul_(c.beta3)))
        wide.copy_(s.copy_(wide.addcmul_(g, c.lam)))
        sums[:, 0] = dot.mul_(-c.lam)
        sums[:, 1] = wide.abs_().sum(1)
    else:
        sums[:, 0] = dot.neg_()
        sums[:, 1] = moved.abs().sum(1)
        sums[:, 2] = moved.square().sum(1)


def _update_schedule_free(work: Piece, settings: Settings, divisor: Tensor | None) -> None:
    """Moves y and z by Schedule-Free's step."""
    y, z, c = work.y, work.z, work.c
    u, gain = _raw_update(work.g, work, settings)
    _prodigy_sums(work, z)
    factor = _rms_scaled(u, gain, work, settings, divisor)
    decays = work.step.decays[work.stack.kind.group]
    start = y.clone() if decays and not settings.weight_decay_by_lr else None
    if decays:
        u, factor = u.mul_(factor), 1.0
    if decays and settings.weight_decay_by_lr:
        u.addcmul_(y, c.decay)
    advance(y, z, u, c.dlr * factor, c.weight, c.y_share)
    if start is not None:
        z.addcmul_(start, c.decay_apart, value=-1)
        y.addcmul_(start, c.decay_apart * c.y_share, value=-1)


def _moment(work: Piece) -> Tensor:
    """Prodigy's first moment, which takes z's place in the state: m <- beta1 m + (1 - beta1) d g."""
    m, c = work.z, work.c
    return m.mul_(c.beta1).addcmul_(work.g * c.d, c.gain)


def _update_with_moment(work: Piece, settings: Settings, divisor: Tensor | None) -> None:
    """Moves the weights by plain Prodigy's step: no average, for an outside schedule."""
    y, c = work.y, work.c
    direction = _moment(work)
    _prodigy_sums(work, y)
    u, gain = _raw_update(direction / c.d, work, settings)
    factor = _rms_scaled(u, gain, work, settings, divisor)
    y.mul_(1 - c.dlr * c.decay - c.decay_apart)
    y.addcmul_(u, c.dlr * factor, value=-1)


def _write_back(work: Piece, params: list[Tensor], settings: Settings, step_key: int) -> None:
    """Writes y to the parameters and z to the state, rounded to their dtype, where they are not there already."""
    stack, y, z, scratch = work.stack, work.y, work.z, work.step.scratch
    if stack.kind.dtype == torch.bfloat16:
        if settings.stochastic_rounding:
            shape = (len(params), stack.kind.numel)
            x, spare = (scratch.take(name, *shape).view(torch.int32) for name in ("g", "u"))
            for_y, for_z = random_bits(stack.keys[work.piece] ^ step_key, stack.kind.offset, x, spare)
            round_stochastic_(y.view(shape), for_y)
            round_stochastic_(z.view(shape), for_z)
        stack.z[work.piece].copy_(z)
    if y.untyped_storage()._cdata != params[0].untyped_storage()._cdata:  # fake tensors have no other address
        torch._foreach_copy_(params, y.unbind(0))
