"""What both compiled steps are and know, and how they deal their work out."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from optim.settings import Settings
from optim.steps.stacks import Stack

MOST_K = 64
"""Largest number of elements along the axes that are not factored; tensors with more are left to the plain path."""


class Call(Protocol):
    """A step of some parameters, measured and not yet made."""

    def advance(self, coefficients: Tensor, all_finite: Tensor, step_key: int) -> None:
        """Makes the step, unless `all_finite` (bool, 0-dim) is False.

        coefficients: float32 (coefficients, groups).
        """


class Table(Protocol):
    """Where parameters of one dtype and their state lie in memory, one row per parameter."""

    @property
    def indices(self) -> list[int]:
        """The places of these parameters among all parameters, in the order of the rows."""

    def measure(self, present: Sequence[int], params: Sequence[Tensor], grads: Sequence[Tensor]) -> Call:
        """Writes the sums of g^2 to `totals`, `row_now` and `col_now` of the stacks.

        present: the indices of the parameters that have a gradient, in the order of the rows.
        """


class CompiledStep(Protocol):
    """A module that makes the step of `plain.py` by compiled code: `cpu.py` or `cuda.py`."""

    @property
    def usable(self) -> Callable[[list[Stack], Settings], list[Stack]]:
        """The stacks that the compiled step supports; [] with a warning where it cannot be had, or is wrong."""

    @property
    def Table(self) -> Callable[[list[Stack], Settings], Table]:  # noqa: N802 - a class of the module
        """Makes the table of usable stacks of one dtype."""


def supports(settings: Settings) -> bool:
    """Whether the compiled steps know these settings: Schedule-Free's step, without SPEED."""
    return settings.use_schedulefree and not settings.use_speed


def supports_stack(stack: Stack, settings: Settings) -> bool:
    """Whether the compiled steps know such tensors.

    The factored axes must come first, the others be short, and the factors be float32; and StableAdamW's RMS must not
    need other ranks.
    """
    leading = stack.kind.axes == (0, 1) and stack.kind.shape[2:].numel() <= MOST_K
    factored = stack.row is None or (leading and stack.row.dtype == torch.float32)
    return factored and not (settings.scales_by_rms and stack.kind.split is not None)


def numbered(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as many times as its count says, and beside it 0, 1, 2, ...; int64 (n,) and (n,) to two (sum,)."""
    job = torch.repeat_interleave(rows, counts)
    first = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    return job, torch.arange(len(job)) - first
