"""Watches for losses and gradients that are not finite: such a step changes nothing, several in a row end the run.

Nothing here waits for the device: whether a step was left out is in the numbers that are read for the screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdtrain.data.examples import Example
from sdtrain.errors import NotFiniteError, Problem
from sdtrain.training.watching.records import GroupRecord, NoteRecord, StepRecord, Watcher

LIMIT = 5
"""The number of left-out steps in a row that ends the run."""
TOLD = 10
"""The number of left-out steps that are told one by one; of later ones only the log and the summary tell."""
NAMED = 3
"""The number of parameters that a message names."""


def backward(loss: Tensor, scale: float | Tensor = 1.0) -> None:
    """Add the gradients of a loss () times a scale, a number or a tensor (). Those of a loss that is not finite are not
    finite either.

    An infinite loss may have finite gradients; with these the step would be taken. So the optimizer, which leaves out
    a step whose gradients are not finite, leaves out this one too, and no device has to be asked.
    """
    seed = scale if isinstance(scale, Tensor) else torch.full_like(loss, scale)
    seed = torch.where(loss.detach().isfinite(), seed, torch.full_like(loss, math.nan))
    loss.backward(seed)  # type: ignore[no-untyped-call]


class NonFiniteGuard:
    """Counts the steps in a row that were left out because a loss or a gradient was not finite."""

    def __init__(self, groups: Sequence[GroupRecord], *, fused: bool) -> None:
        """groups: as they are before the first step. fused: whether weights move within backward, one by one."""
        self._skipped, self._fused = _num_skipped(groups), fused
        self._in_a_row, self._told = 0, 0

    @property
    def is_sound(self) -> bool:
        """Whether the last step was taken: only then is a state worth a place among those that are kept."""
        return self._in_a_row == 0

    def was_left_out(self, groups: Sequence[GroupRecord]) -> bool:
        """Return whether the step was left out, and count it."""
        before, self._skipped = self._skipped, _num_skipped(groups)
        left_out = self._skipped > before
        self._in_a_row = self._in_a_row + 1 if left_out else 0
        return left_out

    def tell(self, record: StepRecord, gradients: str, tell: Watcher) -> None:
        """Tell of a step that was left out. Raises NotFiniteError after LIMIT of them in a row.

        gradients: which gradients were not finite, see `bad_gradients`.
        """
        pictures = ", ".join(record.pictures)
        if self._told < TOLD:
            self._told += 1
            last = "; further ones stand in log.jsonl alone" if self._told == TOLD else ""
            tell(NoteRecord(record.step, f"step {record.step}: {self._what(record, gradients)}{pictures}{last}"))
        if self._in_a_row >= LIMIT:
            changed = "little" if self._fused else "no weight"
            what = (
                f"not finite {LIMIT} times in a row; {changed} was changed since it began. Go on with `--resume` and "
                "model.dtype = float32 or a lower optimizer.d_coef, or look at the pictures of these steps, which "
                f"log.jsonl names; the last ones: {pictures}"
            )
            where = "gradients" if math.isfinite(record.loss) else "loss"
            raise NotFiniteError(f"step {record.step}", [Problem(where, what)])

    def _what(self, record: StepRecord, gradients: str) -> str:
        if not math.isfinite(record.loss):
            return f"the loss is {record.loss}, so nothing was changed; pictures in this step: "
        if self._fused:
            return (
                f"the loss is {record.loss:.4g}, but a gradient is not finite; in a fused backward the weights that "
                "had moved before it was met stay moved, the others were left; pictures in this step: "
            )
        loss = f"the loss is {record.loss:.4g}"
        return f"{loss}, but {gradients} not finite, so nothing was changed; pictures in this step: "


def bad_gradients(names: Sequence[str], bad: Sequence[int]) -> str:
    """Return which gradients are not finite, as a part of a sentence.

    names: of all parameters. bad: the numbers of those whose gradients are not finite.
    """
    more = ", ..." if len(bad) > NAMED else ""
    named = ", ".join(names[number] for number in bad[:NAMED])
    return f"the gradients of {len(bad)} of {len(names)} parameters ({named}{more}) are"


def files_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the files of a step's pictures, each once."""
    return tuple(sorted({str(example.path) for example in examples}))


def _num_skipped(groups: Sequence[GroupRecord]) -> int:
    return max(group.skipped for group in groups)
