"""A context in which the model holds the averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Averaging(Protocol):
    """What `averaged` needs of an optimizer."""

    @property
    def holds_average(self) -> bool:
        """Whether the model holds x."""

    def eval(self) -> None:
        """Gives the model x."""

    def train(self) -> None:
        """Gives the model y."""


@contextmanager
def averaged(optimizer: Averaging) -> Iterator[None]:
    """Within the block the model holds x, the averaged weights: sample, validate and save there.

    Afterwards it holds y again, bit for bit, also if the block raised. Within another such block it changes nothing.
    While it lasts a copy of y is kept, `step()` raises RuntimeError, and changes to the weights are lost at its end.
    """
    if optimizer.holds_average:
        yield
        return
    try:
        optimizer.eval()  # within, for it copies, and where memory runs out some weights are x and some are y
        yield
    finally:
        optimizer.train()
