"""The scale of a loss that is computed in float16, whose small gradients would be zeros and whose large ones overflow.

Backward begins with a power of two instead of 1, and gradients are divided by it before anybody sees them, which is
exact. The scale follows from which steps were left out, so it is the same on all ranks; training states hold it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

FIRST, HIGHEST = 2.0**16, 2.0**24
"""What a scale begins with, as in PyTorch's GradScaler, and where it stays."""
PATIENCE = 2000
"""The number of steps without an overflow after which a scale doubles, as there."""


class LossScale:
    """By what a loss is multiplied in backward: it halves where gradients overflow and doubles after many good steps.

    Where nothing is computed in float16 it is 1 and stays so.
    """

    def __init__(self, *, is_used: bool) -> None:
        self.is_used = is_used
        self.value, self._num_good = FIRST if is_used else 1.0, 0

    @property
    def state(self) -> tuple[float, int] | None:
        """What a run goes on with: the scale, and how many good steps there were since it changed."""
        return (self.value, self._num_good) if self.is_used else None

    def go_on_from(self, state: tuple[float, int] | None) -> None:
        """Take up a `state`; a run that computed in another type before has none."""
        if self.is_used and state is not None:
            self.value, self._num_good = state

    def note(self, *, left_out: bool) -> bool:
        """Take note of a step; return whether it was left out for a scale that has become smaller since."""
        if not self.is_used:
            return False
        before, self._num_good = self.value, 0 if left_out else self._num_good + 1
        if left_out:
            self.value = max(1.0, self.value / 2)
        elif self._num_good == PATIENCE:
            self.value, self._num_good = min(HIGHEST, self.value * 2), 0
        return self.value < before

    @property
    def overflow(self) -> str:
        """What is told of a step after which the scale became smaller."""
        return (
            f"a gradient is too large for float16; the step was left out, the scale of the loss is {self.value:g} now"
        )

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients that backward has left, in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.is_used and gradients:
            torch._foreach_mul_(gradients, 1 / self.value)

    def unscale_within(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients while backward makes them, for an optimizer that moves weights within it."""
        if self.is_used:
            for parameter in parameters:
                parameter.register_hook(self._unscaled)  # type: ignore[no-untyped-call]

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient * (1 / self.value)
