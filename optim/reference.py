"""The optimizer as a plain float64 loop: the definition that every fast path is held to by tests.

One tensor after the other, one formula after the other, nothing stacked, nothing in place but the state. What is
rounded is rounded because the definition says so: p0, s and its sum are bfloat16. Weights and z are float64 here.
"""

import math
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from optim.settings import Settings


@dataclass
class ReferenceTensor:
    """One parameter: y and its state."""

    y: Tensor
    z: Tensor  # or the first moment
    p0: Tensor
    s: Tensor
    v: Tensor
    row: Tensor
    col: Tensor
    axes: tuple[int, int] | None
    dot: float = 0.0
    l1: float = 0.0
    l2: float = 0.0


REST_PATIENCE = 40
"""d is at rest, and weights hold, once it has not grown by half for so many steps and half as many as it climbed ..."""
UNMOVED_PATIENCE = 100
"""... or for so many, if it never did."""


class Reference:
    """groups: lists of start values. lr: one per group, its weight, which no schedule changes; all else is as the
    settings say, for all groups alike."""

    def __init__(self, groups: list[list[Tensor]], settings: Settings, *, lr: list[float]) -> None:
        self.settings, self.lr, d0 = settings, lr, settings.d0
        self.groups = [[self._start(value) for value in group] for group in groups]
        self.d = [d0 for _ in groups]
        self.r = [0.0 for _ in groups]
        self.peak = [0.0 for _ in groups]
        self.W = [0.0 for _ in groups]
        self.k = 1
        self.frozen = [False for _ in groups]
        self.climb = [(d0, 1) for _ in groups]  # d when it last grew by half, and the step of that

    def _start(self, value: Tensor) -> ReferenceTensor:
        value = value.detach().double()
        settings = self.settings
        axes = None
        if settings.factored and value.dim() >= 2 and max(value.shape) >= 32:
            largest = sorted(range(value.dim()), key=lambda axis: (value.shape[axis], axis))[-2:]
            axes = (min(largest), max(largest))
        first, second = axes or (0, 0)
        sliced = value.reshape(-1)[::11]
        zeros = torch.zeros_like(value)
        return ReferenceTensor(
            y=value.clone(),
            z=value.clone() if settings.use_schedulefree else zeros.clone(),
            p0=sliced.bfloat16().double(),
            s=torch.zeros_like(sliced),
            v=zeros.clone(),
            row=zeros.mean(second, keepdim=True) if axes else zeros,
            col=zeros.mean(first, keepdim=True) if axes else zeros,
            axes=axes,
        )

    def mean(self, d: list[float], active: list[bool]) -> list[float]:
        """What each group's step is made with: its own d, or a mean over the groups that take part in it."""
        if not self.settings.split_groups:
            return d
        present = list(compress(d, active))
        match self.settings.split_groups_mean:
            case "harmonic_mean":
                mean = len(present) / sum(1 / d for d in present)
            case "geometric_mean":
                mean = math.exp(sum(math.log(d) for d in present) / len(present))
            case "mean":
                mean = sum(present) / len(present)
            case None:
                return d
        return [mean] * len(d)

    def step(self, gradients: list[list[Tensor]]) -> None:
        """One step, from gradients at y; a group without any (an empty list) takes no part."""
        settings, active = self.settings, [bool(grads) for grads in gradients]
        steps = settings.prodigy_steps
        if isinstance(steps, int) and 0 < steps <= self.k:
            self.frozen = [True for _ in self.groups]
        settled = [frozen or self._rests(index, self.k) for index, frozen in enumerate(self.frozen)]
        d = [d * settings.d_coef if rests else d for d, rests in zip(self.d, settled, strict=True)]
        applied, pace = self.mean(d, active), self.mean(self.d, active)
        num, den = [0.0] * len(self.groups), [0.0] * len(self.groups)
        for index, (group, grads) in enumerate(zip(self.groups, gradients, strict=True)):
            if not grads:
                continue
            factor, beta2 = self._rectified() if settings.use_bias_correction else (1.0, settings.betas[1])
            dlr = applied[index] * (self.lr[index] if settled[index] else 1.0) * factor
            counts = (pace[index] * factor) ** 2
            self.W[index] += counts
            c = counts / self.W[index] if self.W[index] > 0 else 0.0
            if settings.schedulefree_c > 0:
                c = min(1.0, c * (1 - settings.betas[0]) * settings.schedulefree_c)
            for tensor, g in zip(group, grads, strict=True):
                more = self._step_tensor(tensor, g.double(), self.d[index], dlr, c, beta2, self.frozen[index])
                num[index] += more[0]
                den[index] += more[1]
        if not settings.split_groups:
            num, den, active = [sum(num)] * len(num), [sum(den)] * len(den), [True] * len(den)
        for index in compress(range(len(self.groups)), active):
            if not self.frozen[index]:
                self._estimate(index, num[index], den[index])
                if self.d[index] > 1.5 * self.climb[index][0]:
                    self.climb[index] = (self.d[index], self.k)
                if self._is_weighed(index) and self.climb[index][1] > 1:
                    self.frozen[index] = self._rests(index, self.k + 1)
        self.k += 1

    def _rests(self, index: int, k: int) -> bool:
        """Whether a group's d is at rest at step k, so that its weight holds and, if it has one, d is fixed."""
        climb_k = self.climb[index][1]
        return k - climb_k >= (max(REST_PATIENCE, 0.5 * climb_k) if climb_k > 1 else UNMOVED_PATIENCE)

    def _is_weighed(self, index: int) -> bool:
        mine = self.lr if not self.settings.split_groups else [self.lr[index]]
        return self.settings.d_coef != 1 or any(lr not in (0, 1) for lr in mine)

    def _rectified(self) -> tuple[float, float]:
        """RAdam, eq. 7, and the beta2 of a bias-corrected average."""
        beta2, k = self.settings.betas[1], self.k
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * k * beta2**k / (1 - beta2**k)
        factor = 0.0
        if length > 4:
            factor = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        return factor, 1 - (1 - beta2) / (1 - beta2**k)

    def _root(self, t: ReferenceTensor, g: Tensor, d: float, beta2: float) -> Tensor:
        """sqrt v, after v took in g."""
        square = (1 - beta2) * d**2 * g**2
        if t.axes is None:
            t.v = beta2 * t.v + square
            return t.v.sqrt()
        t.row = beta2 * t.row + square.mean(t.axes[1], keepdim=True)
        t.col = beta2 * t.col + square.mean(t.axes[0], keepdim=True)
        mean = t.row.mean(t.axes[0], keepdim=True)
        return (torch.where(mean > 0, t.row / mean, 0.0) * t.col).sqrt()

    def _update(self, numerator: Tensor, root: Tensor, d: float) -> Tensor:
        if self.settings.eps is None:
            return 4 / math.pi * torch.atan2(numerator, root)
        return numerator / (root + d * self.settings.eps)

    def _step_tensor(
        self, t: ReferenceTensor, g: Tensor, d: float, dlr: float, c: float, beta2: float, frozen: bool
    ) -> tuple[float, float]:
        """Moves one tensor; returns what it adds to num and den."""
        settings, beta1 = self.settings, self.settings.betas[0]
        at = t.z if settings.use_schedulefree else t.y
        direction = d * g
        if not settings.use_schedulefree:
            direction = t.z = beta1 * t.z + (1 - beta1) * d * g
        u = self._update(direction, self._root(t, g, d, beta2), d)
        if settings.scales_by_rms:
            u = u / math.sqrt(max(1.0, float(u.square().mean().sqrt())))
        sums = (0.0, 0.0) if frozen else self._sums(t, g, at, d)
        self._advance(t, u, dlr, c, beta1)
        return sums

    def _advance(self, t: ReferenceTensor, u: Tensor, dlr: float, c: float, beta1: float) -> None:
        """Schedule-Free's sequences, or plain Prodigy's step."""
        settings = self.settings
        apart = 0.0 if settings.weight_decay_by_lr else self.settings.weight_decay
        decay = self.settings.weight_decay if settings.weight_decay_by_lr else 0.0
        if not settings.use_schedulefree:
            t.y = (1 - dlr * decay - apart) * t.y - dlr * u
            return
        share, start = 1 - beta1 * (1 - c), t.y
        u = u + decay * start
        t.y = (1 - c) * t.y + c * t.z - dlr * share * u
        t.z = t.z - dlr * u - apart * start
        t.y = t.y - apart * share * start

    def _sums(self, t: ReferenceTensor, g: Tensor, at: Tensor, d: float) -> tuple[float, float]:
        """Prodigy's sums over every 11th element, or SPEED's."""
        lam = d**2 / math.sqrt(self.settings.d0)
        g, away = g.reshape(-1)[::11], t.p0 - at.reshape(-1)[::11]
        dot = float(g @ away)
        if self.settings.use_speed:
            beta = 1 - self.k**-0.75
            t.dot = beta * t.dot + (1 - beta) * dot
            t.l1 = max(t.l1, float(away.abs().sum()), 1e-8)
            t.l2 = max(t.l2, float(away.norm()), 1e-8)
            return lam / (1 + t.l2) ** 2 * t.dot / t.l1, 1.0
        t.s = (self.settings.decay_of_sums * t.s).bfloat16().double()
        t.s = (t.s + lam * g).bfloat16().double()
        return lam * dot, float(t.s.abs().sum().bfloat16())

    def _estimate(self, index: int, num: float, den: float) -> None:
        """d of the next step."""
        settings, d, before = self.settings, self.d[index], self.r[index]
        self.r[index] = settings.decay_of_sums * before + (num if d > self.settings.d0 or num > 0 else 0.0)
        self.peak[index] = max(self.peak[index], self.r[index])
        if settings.use_speed:
            if self.r[index] >= self.peak[index] and self.r[index] > 0 and before > 0:
                growth = min(2**0.25, math.sqrt(self.r[index] / before))
                self.d[index] = max(d, d * growth)
            return
        if den <= 0:
            return
        target, beta4 = self.r[index] / den, settings.decay_of_d
        if settings.d_limiter:
            target = min(target, 2**0.25 * d)
        averaged = abs(beta4) * d + (1 - abs(beta4)) * target
        if beta4 == 0:
            new = max(d, target)
        elif beta4 > 0:
            new = averaged
        else:
            new = averaged if target < d else target
        self.d[index] = max(new, self.settings.d0)
