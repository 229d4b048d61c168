"""Watches for losses that are not finite: such a step changes nothing, and several in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdtrain.data.examples import Example
from sdtrain.errors import user_error
from sdtrain.training.watching.records import NoteRecord, Watcher

LIMIT = 5
"""The number of steps in a row without a finite loss that ends the run."""


class NonFiniteGuard:
    """Counts the steps in a row whose loss is not finite."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def check(self, loss: float, examples: Sequence[Example], step: int, tell: Watcher) -> None:
        """Tell of a loss that is not finite. Raises UserError after LIMIT of them in a row."""
        if math.isfinite(loss):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        names = ", ".join(sorted({str(example.path) for example in examples}))
        text = f"step {step}: the loss is {loss}, so nothing was changed; pictures in this step: {names}"
        tell(NoteRecord(step, text))
        if self._in_a_row >= LIMIT:
            raise user_error(
                f"step {step}",
                "loss",
                f"not finite {LIMIT} times in a row; the last training state is whole and nothing was changed since "
                f"the loss broke. Try model.dtype = float32, a lower optimizer.d_coef, or other pictures than: {names}",
            )
