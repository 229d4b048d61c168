"""Lending the model the averaged weights, and taking them back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Lends(Protocol):
    """What `averaged` needs of an optimizer."""

    @property
    def lent(self) -> bool: ...

    def eval(self) -> None: ...

    def train(self) -> None: ...


@contextmanager
def averaged(optimizer: Lends) -> Iterator[None]:
    """Within the block the model holds x, the averaged weights: sample, validate and save there.

    Afterwards it holds y again, bit for bit, also if the block raised. Within another such block it changes nothing.
    While it lasts a copy of y is kept, `step()` raises RuntimeError, and changes to the weights are lost at its end.
    """
    if optimizer.lent:
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
