"""Every setting of the optimizer, checked once and then frozen."""

import math
from dataclasses import dataclass
from typing import Literal

SplitGroupsMean = Literal["harmonic_mean", "geometric_mean", "mean"]
MEANS: tuple[str, ...] = ("harmonic_mean", "geometric_mean", "mean")

GROUP_SETTINGS = ("lr", "weight_decay", "d0", "d_coef")
"""The settings that a parameter group may hold a value of its own for; all others are the whole optimizer's."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for the whole optimizer. The arguments of `ProdigyPlusScheduleFree` explain each one."""

    betas: tuple[float, float]
    beta3: float | None
    beta4: float | None
    weight_decay_by_lr: bool
    d_limiter: bool
    prodigy_steps: int | Literal["auto"]
    eps: float | None
    split_groups: bool
    split_groups_mean: SplitGroupsMean | None
    factored: bool
    factored_fp32: bool
    use_schedulefree: bool
    schedulefree_c: float
    use_stableadamw: bool
    use_bias_correction: bool
    use_speed: bool
    stochastic_rounding: bool
    fused_back_pass: bool
    seed: int

    def __post_init__(self) -> None:
        problems = [*_range_problems(self), *_pair_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def decay_of_sums(self) -> float:
        """beta3, which is sqrt(beta2) where none is given (Prodigy, section 4)."""
        return math.sqrt(self.betas[1]) if self.beta3 is None else self.beta3

    @property
    def decay_of_d(self) -> float:
        """beta4, which is beta2 where None is given."""
        return self.betas[1] if self.beta4 is None else self.beta4

    @property
    def scales_by_rms(self) -> bool:
        """StableAdamW's scaling is for eps > 0: the update of atan2 is bounded already."""
        return self.use_stableadamw and self.eps is not None


def check_group(name: str, lr: object, weight_decay: object, d0: object, d_coef: object) -> list[str]:
    """What is wrong with the values of one group, as sentences; an empty list if nothing is."""
    problems = []
    for key, value, above_zero in (
        ("lr", lr, False),
        ("weight_decay", weight_decay, False),
        ("d0", d0, True),
        ("d_coef", d_coef, True),
    ):
        allowed = "a number > 0" if above_zero else "a number >= 0"
        if not _is_number(value) or value < 0 or (above_zero and value == 0):  # type: ignore[operator]
            problems.append(f"{key} = {value!r} in group {name!r}: must be {allowed}")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _range_problems(s: Settings) -> list[str]:
    problems = []

    def expect(holds: bool, setting: str, value: object, allowed: str) -> None:
        if not holds:
            problems.append(f"{setting} = {value!r}: must be {allowed}")

    pair = isinstance(s.betas, tuple) and len(s.betas) == 2 and all(_is_number(beta) for beta in s.betas)
    expect(pair, "betas", s.betas, "two numbers")
    if pair:
        expect(0 < s.betas[0] < 1, "betas[0]", s.betas[0], "within (0, 1): the average x is y + (1 - 1/beta1)(z - y)")
        expect(0 <= s.betas[1] < 1, "betas[1]", s.betas[1], "within [0, 1)")
    expect(s.beta3 is None or (_is_number(s.beta3) and 0 <= s.beta3 < 1), "beta3", s.beta3, "None or within [0, 1)")
    expect(s.beta4 is None or (_is_number(s.beta4) and -1 < s.beta4 < 1), "beta4", s.beta4, "None or within (-1, 1)")
    expect(s.eps is None or (_is_number(s.eps) and s.eps > 0), "eps", s.eps, "None (atan2, no epsilon) or > 0")
    steps = s.prodigy_steps
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
    expect(whole or steps == "auto", "prodigy_steps", steps, 'a whole number >= 0 or "auto"')
    c = s.schedulefree_c
    expect(_is_number(c) and c >= 0, "schedulefree_c", c, "a number >= 0")
    mean = s.split_groups_mean
    expect(mean is None or mean in MEANS, "split_groups_mean", mean, f"None or one of {', '.join(MEANS)}")
    expect(
        isinstance(s.seed, int) and not isinstance(s.seed, bool) and 0 <= s.seed < 2**63,
        "seed",
        s.seed,
        "a whole number within [0, 2**63)",
    )
    return problems


def _pair_problems(s: Settings) -> list[str]:
    """Settings that contradict one another are refused together, with the reason; nothing is switched off in
    silence."""
    pairs = (
        (
            not s.use_schedulefree and s.schedulefree_c > 0,
            "schedulefree_c > 0 with use_schedulefree=False: there is no average to weigh",
        ),
        (
            s.use_speed and s.beta4 != 0,
            "use_speed with beta4 other than 0: SPEED's d only grows, it has no estimate to average",
        ),
    )
    return [reason for holds, reason in pairs if holds]
