"""Every setting of the optimizer: its default, its meaning and its range, each said once."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, fields
from functools import update_wrapper
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from torch import Tensor

SplitGroupsMean = Literal["harmonic_mean", "geometric_mean", "mean"]
MEANS: tuple[str, ...] = ("harmonic_mean", "geometric_mean", "mean")

GROUP_SETTINGS = ("lr", "weight_decay", "d0", "d_coef")
"""The settings that a parameter group may hold a value of its own for; all others are the whole optimizer's."""

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """How the optimizer is to work. `lr`, `weight_decay`, `d0` and `d_coef` hold for groups that set none of their own.

    Args:
        lr: factor of the step size that is found; 1, or the weight of a group beside others. It holds once d is at
            rest, for d is found with steps of weight 1; the d of a group that has one is fixed then.
        betas: beta1, the place of y between z and x; beta2, decay of the second moment.
        beta3: decay of Prodigy's sums; None: sqrt(beta2).
        weight_decay: decoupled weight decay, taken at y.
        weight_decay_by_lr: whether the decay is multiplied by the step size.
        d0: the first d; with `split_groups_mean=None` 1e-5 to 1e-4 may help.
        d_coef: factor of the estimate of d, which holds as a weight does; the one to tune, if any.
        d_limiter: let d grow by a factor of at most 2^(1/4) per step.
        prodigy_steps: fix d from this step on and free what its estimate needs; 0: never; "auto": when d has stopped
            growing.
        freeze_after: with prodigy_steps="auto", the first step in which d may be fixed.
        eps: None: the update is (4/pi) atan2(d g, sqrt v); > 0: it is d g / (sqrt v + d eps).
        split_groups: every group estimates its own d; False: one d for all.
        split_groups_mean: with split groups, apply this mean of the groups' d ("harmonic_mean", "geometric_mean",
            "mean"); None: each group applies its own.
        beta4: 0: d never falls; > 0: d is a running average of the estimate; < 0: an average on the way down only;
            None: beta2.
        factored: keep row and column means in place of the second moment (two or more axes, one of 32 or more).
        factored_fp32: keep these means in float32 whatever the parameters are in.
        use_schedulefree: False: plain Prodigy with a first moment, for an outside schedule.
        schedulefree_c: > 0: weight of the newest z in the average, arXiv 2507.09846 (6 to 12 for short noisy runs, 50
            to 200 for long ones); 0: the plain average.
        use_stableadamw: with eps > 0, divide the update by sqrt(max(1, its RMS)); atan2 is bounded and needs none.
        use_bias_correction: RAdam's rectified warm-up.
        use_speed: SPEED in place of Prodigy's ratio: scale-free, less memory, experimental.
        stochastic_rounding: round bfloat16 weights and z stochastically.
        fused_back_pass: update parameters within backward, a few at a time (64 MiB of gradients at most, and a
            thirty-second of all), and drop their gradients; `step()` then ends the step.
        set_aside_on_cpu: keep y in the host's memory while the model holds the averaged weights, not on the device.
        seed: of the stochastic rounding; must be the same on every rank.
        compile: whether to compile the step for this machine on first use; None: where it pays (from a million
            parameters). Where that is not possible, plain torch is used, with one warning.

    Raises:
        ValueError: values out of range, or settings that contradict one another; all of them are named.
    """

    lr: float = 1.0
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.99)
    beta3: float | None = None
    weight_decay: float = 0.0
    weight_decay_by_lr: bool = True
    d0: float = 1e-6
    d_coef: float = 1.0
    d_limiter: bool = True
    prodigy_steps: int | Literal["auto"] = 0
    freeze_after: int = 0
    eps: float | None = None
    split_groups: bool = True
    split_groups_mean: SplitGroupsMean | None = "harmonic_mean"
    beta4: float | None = 0.0
    factored: bool = True
    factored_fp32: bool = True
    use_schedulefree: bool = True
    schedulefree_c: float = 0.0
    use_stableadamw: bool = True
    use_bias_correction: bool = False
    use_speed: bool = False
    stochastic_rounding: bool = True
    fused_back_pass: bool = False
    set_aside_on_cpu: bool = False
    seed: int = 0
    compile: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):  # as JSON and TOML have it
            object.__setattr__(self, "betas", tuple(self.betas))
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


P = ParamSpec("P")
Self = TypeVar("Self")


def with_settings_as_keywords(
    make: Callable[P, Settings],
) -> Callable[[Callable[[Self, Params, Settings], None]], Callable[Concatenate[Self, Params, P], None]]:
    """Lets an `__init__(self, params, settings)` be called as `(params, lr=..., betas=..., ...)`.

    Names, types and defaults are those of `Settings`, for type checkers and for `help()`, without being written again.

    Raises:
        TypeError: (the decorated function) a keyword that is no setting, with the nearest that is one.
    """

    def decorate(init: Callable[[Self, Params, Settings], None]) -> Callable[Concatenate[Self, Params, P], None]:
        def with_keywords(self: Self, params: Params, *args: P.args, **settings: P.kwargs) -> None:
            _refuse_unknown(list(settings))
            init(self, params, make(*args, **settings))

        update_wrapper(with_keywords, init)
        both = (*list(inspect.signature(init).parameters.values())[:2], *inspect.signature(make).parameters.values())
        setattr(with_keywords, "__signature__", inspect.Signature(both))  # noqa: B010 - what `help()` looks for
        # the checker fears a setting called `self` or `params`
        return with_keywords  # type: ignore[return-value]

    return decorate


def _refuse_unknown(names: list[str]) -> None:
    known = [field.name for field in fields(Settings)]
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise TypeError("; ".join(problems))


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


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
    expect(_is_whole(steps) or steps == "auto", "prodigy_steps", steps, 'a whole number >= 0 or "auto"')
    after = s.freeze_after
    expect(_is_whole(after), "freeze_after", after, "a whole number >= 0")
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
            s.prodigy_steps != "auto" and s.freeze_after != 0,
            'freeze_after without prodigy_steps="auto": a number of prodigy_steps is the step itself',
        ),
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
