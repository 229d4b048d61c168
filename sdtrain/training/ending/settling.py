"""What a step came to: read, told and judged, on a card when the next step's work is on its way.

Reading a number waits until the card has done all before it. Who reads the loss at the end of every step lets the card
wait in turn, until the host has sent the next one's work. So a step's numbers are fetched in the background and read
before the next update, or before anything that needs them: a preview, a state, the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from optim import fetching
from sdtrain.data.examples import Example
from sdtrain.training.ending.guard import NonFiniteGuard, bad_gradients, files_of
from sdtrain.training.ending.memory import peak_memory_gib
from sdtrain.training.optimizers import group_records, group_records_later
from sdtrain.training.training import Training
from sdtrain.training.watching.pace import Pace
from sdtrain.training.watching.records import GroupRecord, NoteRecord, StepRecord
from sdtrain.training.watching.watchers import Watchers


@dataclass(frozen=True)
class _Taken:
    """A step that was made and not yet told. images_per_s: None where it is known only when the numbers are read."""

    step: int
    examples: list[Example]
    loss: Callable[[], Tensor]
    groups: Callable[[], tuple[GroupRecord, ...]]
    images_per_s: float | None


class Settling:
    """Tells of every step once, in their order."""

    def __init__(self, training: Training, watchers: Watchers) -> None:
        """Look at the optimizer as it is before the next step."""
        self._training, self._watchers, self._pace = training, watchers, Pace()
        fused = training.run.config.memory.fused_back_pass
        self._guard = NonFiniteGuard(group_records(training.optimizer), fused=fused)
        self._names = [] if fused else list(training.trainable.named_parameters())
        self._taken: _Taken | None = None
        self.is_late = training.run.device.type != "cpu" and not fused and not training.scale.is_used
        """Whether a step is told when the next one is on its way. The scale of float16 follows from each step, and what
        a fused backward left out cannot be told later."""
        training.settle = self.settle_quietly

    def begin(self) -> None:
        """Start the clock of a step."""
        self._pace.begin_step()

    def take(self, loss: Tensor) -> None:
        """Take up a step that was made, with its loss (); it is told at once, or with the next one."""
        training = self._training
        examples = training.data.batches.examples_at(training.step - 1)
        rate = self._pace.end_step(len(examples)) if self.is_late else None
        self._taken = _Taken(training.step, examples, fetching(loss), group_records_later(training.optimizer), rate)
        if not self.is_late:
            self.settle()

    def settle_quietly(self) -> None:
        """Tell of the last step, where that was not done, on the way out of a run: it is no reason to end it again."""
        self.settle(may_end=False)

    def settle(self, *, may_end: bool = True) -> None:
        """Tell of the last step, where that was not done. Raises NotFiniteError after too many that were left out."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        training = self._training
        loss, groups = float(taken.loss()), taken.groups()
        skipped = self._guard.was_left_out(groups)
        training.is_sound = self._guard.is_sound
        overflowed = training.scale.note(left_out=skipped) and math.isfinite(loss)
        rate = self._pace.end_step(len(taken.examples)) if taken.images_per_s is None else taken.images_per_s
        record = StepRecord(
            taken.step,
            loss,
            len(taken.examples),
            rate,
            groups,
            skipped,
            files_of(taken.examples) if skipped else (),
            peak_memory_gib(training.run.device),
        )
        self._watchers.tell(record)
        if overflowed:
            self._watchers.tell(NoteRecord(taken.step, f"step {taken.step}: {training.scale.overflow}"))
        elif skipped and may_end:
            bad = bad_gradients(self._names, training.optimizer.not_finite()) if self._names else ""
            self._guard.tell(record, bad, self._watchers.tell)
