"""Validates a run: measures the loss on held-out pictures with the averaged weights, and keeps count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from optim import ProdigyPlusScheduleFree, averaged
from sdtrain.errors import UserError
from sdtrain.files.header import explain
from sdtrain.training.computing.objective import Objective
from sdtrain.training.ranks.place import Place
from sdtrain.training.validating.held_out import HeldOut
from sdtrain.training.validating.history import History, Validation, read_history, write_history
from sdtrain.training.watching.records import NoteRecord, ValidationRecord, Watcher


@dataclass
class Validator:
    """Everything that a run's validation holds. Without held-out pictures it does nothing."""

    held_out: HeldOut | None
    folder: Path
    """The folder of the training states, in which the best is named."""
    patience: int
    history: History = field(default_factory=History)

    def go_on_from(self, step: int) -> None:
        """Take up what a run knew after `step` steps; one that begins knows nothing, whatever lies in its folder."""
        if self.held_out is not None and step > 0:
            self.history = read_history(self.folder, step, self.held_out.pictures)

    def lacks(self, step: int) -> bool:
        """Return whether there are pictures to validate on and `step` was not validated yet."""
        return self.held_out is not None and all(one.step != step for one in self.history.validations)

    @property
    def is_enough(self) -> bool:
        """Whether the loss has not fallen, beyond its standard error, for as many validations as the user waits."""
        return 0 < self.patience <= self.history.waited

    @property
    def pictures(self) -> list[str]:
        """The identities of the held-out pictures, each once, in a fixed order."""
        return self.held_out.pictures if self.held_out else []

    def measure(
        self,
        objective: Objective,
        optimizer: ProdigyPlusScheduleFree,
        is_given_up: Callable[[], bool],
        place: Place,
    ) -> dict[str, float] | None:
        """Return the losses of this process's share of the held-out pictures; None where they are given up.

        The training is as it was before. `is_given_up` is asked between two batches.
        """
        if self.held_out is None:
            return None
        with averaged(optimizer):
            return self.held_out.losses(objective, is_given_up, hand=place.rank, hands=place.size)

    def take(self, losses: Mapping[str, float], step: int, tell: Watcher) -> bool:
        """Keep and tell the held-out losses after `step` steps; return whether they are the best so far."""
        now = Validation(step, losses)
        is_best = self.history.add(now)
        try:
            write_history(self.folder, self.history)
        except UserError as error:  # the numbers are told anyway, and the training is worth more than they are
            tell(NoteRecord(step, f"note: the validations so far could not be kept: {explain(error)}"))
        best = self.history.best
        lowest = (best.step, best.loss) if best else (None, None)
        tell(ValidationRecord(step, now.loss, now.standard_error, len(losses), *lowest))
        if self.is_enough and (anchor := self.history.anchor):
            tell(NoteRecord(step, _enough(step, self.history.waited, anchor)))
        return is_best


def _enough(step: int, waited: int, anchor: Validation) -> str:
    times = "the last validation" if waited == 1 else f"{waited} validations"
    return (
        f"note: training ends at step {step}, for in {times} the held-out loss was not below that of step "
        f"{anchor.step} by more than the standard error of the difference (validation.patience)"
    )
