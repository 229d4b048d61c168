"""What a step calculates with: the numbers of the groups, their settings, and the coefficients of a step.

All numbers of all groups live in one float64 tensor on the device, one column per group, so that the host never has to
wait for one of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SLICE_P = 11
"""Prodigy's sums run over every 11th element of the flattened tensor."""


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
    mark_d: Tensor  # d when it last grew by more than 2 %
    mark_k: Tensor  # and the step of that
    frozen: Tensor  # above 0 once d is fixed: see `freezing.py`
    skipped: Tensor  # steps left out because a gradient was not finite
    active: Tensor  # 1 if any of the group's parameters had a gradient in the last step
    climb_d: Tensor  # d when it last grew by half
    climb_k: Tensor  # and the step of that
    applied_lr: Tensor  # lr of the last step: without the weight while d climbs
    pace: Tensor  # the last step's size without weight and d_coef: what a step counts for in the average
    square: Tensor  # sum of g^2 over the group in the last step
    left_zero: Tensor  # 1 once tensors that began at zero had a gradient; where there are none, once any had

    @staticmethod
    def of(buffer: Tensor) -> "Numbers":
        """Names for the rows of `buffer`; writing to them writes to it."""
        return Numbers(*buffer.unbind(0))

    @staticmethod
    def start(d0: float, device: torch.device) -> Tensor:
        """The column (fields, 1) of a group that has taken no step."""
        first = dict.fromkeys(("k", "mark_k", "climb_k", "active", "applied_lr"), 1.0)
        first |= dict.fromkeys(("d", "applied_d", "mark_d", "climb_d", "pace"), d0)
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
    """The settings of the groups on the device, each float64 (groups,).

    `initial_lr` is the group's weight, and what `lr` was made of it by a schedule is `lr / initial_lr`. any_weighed:
    whether some group has a weight or a `d_coef` other than 1; the host knows, and leaves out what they need if not.
    """

    lr: Tensor
    weight_decay: Tensor
    d0: Tensor
    d_coef: Tensor
    initial_lr: Tensor
    any_weighed: bool
