"""Tensors that may be split over processes, put together one after the other: no process has to hold all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import Tensor

from optim import Piece, in_turn, put_together


class Stream:
    """Hands out whole tensors in the order of their pieces, which all processes keep.

    The next few are put together at once, on all processes alike. Each is let go when it was handed out. At the end of
    a block with it, what nobody took is put together all the same.
    """

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        self._turns = in_turn(pieces.items())
        self._there: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.run_dry()

    def take(self, name: str) -> Tensor:
        """Return the next tensor, which is called `name`, on the device of its pieces. Raises RuntimeError where
        another process is lost."""
        if not self._there:
            self._there = self._next()
        return self._there.pop(name)

    def run_dry(self) -> None:
        """Put together what nobody asked for: the other processes do so, too, and would wait."""
        while self._next():
            pass

    def _next(self) -> dict[str, Tensor]:
        turn = next(self._turns, {})
        try:
            return put_together(turn)
        except BaseException:
            self._turns = iter(())  # the others are elsewhere, or gone
            raise
