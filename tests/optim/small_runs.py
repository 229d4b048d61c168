"""Small tensors of every kind, the settings that are tried on them, and gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree

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
    "d_coef": {"d_coef": 2.0},
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
