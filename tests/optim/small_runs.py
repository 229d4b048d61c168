"""Small tensors of every kind, the settings that are tried on them, and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree
from optim.formulas.numbers import Coefficients
from optim.formulas.second_moment import factored_axes
from optim.settings import Settings
from optim.steps.stacks import Kind
from optim.steps.support import Call
from optim.steps.trial import reason_against

SHAPES = [(16, 48), (48, 16), (40, 8, 3, 3), (8, 40, 3, 3), (40, 5, 36), (7,), (), (3, 5), (1, 64), (64, 1), (33, 34)]
ZEROS = (1, 6)

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "own d": {"split_groups_mean": None},
    "geometric mean": {"split_groups_mean": "geometric_mean"},
    "mean": {"split_groups_mean": "mean"},
    "joint d": {"split_groups": False},
    "beta4 up and down": {"beta4": 0.9},
    "beta4 on the way down": {"beta4": -0.9},
    "beta4 as beta2": {"beta4": None},
    "frozen": {"prodigy_steps": 12},
    "d_coef": {"d_coef": 2.0, "prodigy_steps": 8},
    "d0": {"d0": 1e-5},
    "no limiter": {"d_limiter": False, "d0": 1e-4},
    "eps": {"eps": 1e-3},
    "eps without StableAdamW": {"eps": 1e-3, "use_stableadamw": False},
    "not factored": {"factored": False},
    "not factored, eps": {"factored": False, "eps": 1e-8},
    "refined averaging": {"schedulefree_c": 8.0},
    "weight decay": {"weight_decay": 0.1},
    "weight decay apart": {"weight_decay": 1e-3, "weight_decay_by_lr": False},
    "bias correction": {"use_bias_correction": True, "d0": 1e-3},
    "speed": {"use_speed": True},
    "first moment": {"use_schedulefree": False},
    "first moment, decay": {"use_schedulefree": False, "weight_decay": 0.1},
    "betas": {"betas": (0.95, 0.98), "beta3": 0.97},
}


def used_by(settings: Settings) -> list[str]:
    """The coefficients that a compiled step uses with these settings, in amounts that can be told from rounding."""
    uses = dict.fromkeys(("d", "beta2", "square", "lam", "beta3", "dlr", "weight", "y_share"), True)
    uses["decay"] = settings.weight_decay > 0 and settings.weight_decay_by_lr
    uses["decay_apart"] = settings.weight_decay > 0 and not settings.weight_decay_by_lr
    uses["d_eps"] = settings.eps is not None and settings.eps >= 1e-3
    return [name for name in Coefficients._fields if uses.get(name, False)]


def make_larger(advance: Callable[..., None], coefficient: str) -> Callable[..., None]:
    """A call's `advance` that is handed this coefficient 10 % larger."""

    def with_another(call: Call, coefficients: Tensor, all_finite: Tensor, step_key: int) -> None:
        changed = coefficients.clone()
        changed[Coefficients._fields.index(coefficient)] *= 1.1
        advance(call, changed, all_finite, step_key)

    return with_another


TRIALS = {
    "atan2": Settings(weight_decay=1.0),
    "eps": Settings(weight_decay=1.0, eps=0.1),
    "eps, decay apart": Settings(weight_decay=1.0, eps=0.1, weight_decay_by_lr=False, use_stableadamw=False),
    "not factored": Settings(weight_decay=1.0, factored=False),
}


def unnoticed_by_trial(
    module: Any, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, patch: pytest.MonkeyPatch
) -> list[str]:
    """The coefficients that may be 10 % off without the trial of a compiled step (`cpu` or `cuda`) refusing it.

    "none" is among them where a step that is right is not refused.
    """
    settings, advance, found = TRIALS[name], module.Call.advance, []
    kinds = []
    for shape in map(torch.Size, shapes):
        axes = factored_axes(shape) if settings.factored else None
        kinds.append(Kind(0, shape, shape, None, 0, dtype, axes, starts_at_zero=False))
    for coefficient in ("none", *used_by(settings)):
        if coefficient != "none":
            patch.setattr(module.Call, "advance", make_larger(advance, coefficient))
        if not reason_against(kinds, settings, torch.device("cpu"), module.Table):
            found.append(coefficient)
    patch.setattr(module.Call, "advance", advance)
    return found


def starts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    values = [torch.randn(shape, generator=generator) * 0.3 for shape in SHAPES]
    for index in ZEROS:
        values[index].zero_()
    return values


def gradient(y: Tensor, step: int, index: int) -> Tensor:
    """Of a bowl around 1, with noise; the same for all paths as long as y is."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    noise = torch.randn(y.shape, generator=generator)
    return 0.02 * (y.float() - 1.0) + 0.01 * noise


def build(values: list[Tensor], compile_step: bool, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[
    list[nn.Parameter], ProdigyPlusScheduleFree
]:  # fmt: skip
    params = [nn.Parameter(value.clone().to(dtype)) for value in values]
    groups = [{"params": params[:5], "name": "unet"}, {"params": params[5:], "name": "text", "lr": 0.5}]
    return params, ProdigyPlusScheduleFree(groups, compile=compile_step, **{"d0": 1e-4, **settings})
