"""The gradients that wait to be stepped together within a fused backward."""

from collections.abc import Callable

import torch
from torch import Tensor

SHARE = 32
"""A share of all gradients of one in so many waits at most; a step for each would launch small operations for long."""
MOST_BYTES = 64 * 2**20
"""How many bytes wait at most, beside the gradient that comes last."""


class Waiting:
    """Which parameters wait, and for how many bytes of gradients more."""

    def __init__(self, num_bytes: int = 0) -> None:
        """num_bytes: of all gradients of the step."""
        self.indices: list[int] = []
        self._limit = min(num_bytes // SHARE, MOST_BYTES)
        self._held = 0

    def are_enough_with(self, index: int, parameter: Tensor) -> bool:
        """Whether to step those that wait, now that this one does as well."""
        self.indices.append(index)
        self._held += parameter.nbytes
        return self._held >= self._limit

    def forget(self, index: int) -> None:
        """This one does not wait any more, if it did."""
        if index in self.indices:
            self.indices.remove(index)

    def take(self) -> list[int]:
        """All that waited; nothing waits any more."""
        taken, self.indices, self._held = self.indices, [], 0
        return taken


def hook_for(note: Callable[[], Callable[[int], None] | None], index: int) -> Callable[[Tensor], None]:
    """A hook that hands the index of a parameter, once its gradient is there, to a method while its owner lives.

    note: a `weakref.WeakMethod`.
    """

    @torch.no_grad()
    def hook(_: Tensor) -> None:
        found = note()
        if found is not None:
            found(index)

    return hook
