"""The validations of a run: which was the best, and whether the loss still falls; no torch.

Losses are compared picture by picture. Pictures differ far more from one another than one picture does from step to
step, so the standard error of the paired differences is much smaller than that of a loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sdtrain.files.writer import write_text

BEST = "best.json"
"""The file beside the training states that names the best one."""


@dataclass(frozen=True)
class Validation:
    """The loss of each held-out picture, by its identity, after `step` steps."""

    step: int
    losses: Mapping[str, float]

    @property
    def loss(self) -> float:
        """The mean over the pictures."""
        return fmean(self.losses.values())

    @property
    def standard_error(self) -> float:
        """The standard error of that mean over the pictures."""
        return _standard_error(list(self.losses.values()))

    @property
    def is_finite(self) -> bool:
        """Whether all losses are."""
        return all(map(math.isfinite, self.losses.values()))


def is_better(after: Validation, before: Validation) -> bool:
    """Return whether the loss fell by more than the standard error of the differences between the same pictures."""
    if not (after.is_finite and before.is_finite):
        return after.is_finite
    gains = [before.losses[name] - loss for name, loss in after.losses.items()]
    return fmean(gains) > _standard_error(gains)


@dataclass
class History:
    """All validations of a run, oldest first."""

    validations: list[Validation] = field(default_factory=list)

    def add(self, validation: Validation) -> bool:
        """Add a validation, in place of one of the same step; return whether it is the best so far."""
        self.validations = [*(one for one in self.validations if one.step != validation.step), validation]
        return self.best is validation

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest loss, of equal ones the first; that of no steps does not count."""
        trained = [one for one in self.validations if one.step > 0 and one.is_finite]
        return min(trained, key=lambda one: (one.loss, one.step), default=None)

    @property
    def anchor(self) -> Validation | None:
        """The last validation that was better, beyond its standard error, than the one of which that was said before.

        So many small gains count together.
        """
        anchor: Validation | None = None
        for one in self.validations:
            if anchor is None or is_better(one, anchor):
                anchor = one
        return anchor

    @property
    def waited(self) -> int:
        """The number of validations since the anchor."""
        anchor = self.anchor
        return 0 if anchor is None else sum(one.step > anchor.step for one in self.validations)


def write_history(folder: Path, history: History) -> None:
    """Write the validations into the folder of the training states, the best one on top. Raises UserError."""
    best = history.best
    content = {
        "step": best.step if best else None,
        "loss": best.loss if best else None,
        "standard_error": best.standard_error if best else None,
        "pictures": list(history.validations[0].losses) if history.validations else [],
        "validations": [{"step": one.step, "losses": _finite(one)} for one in history.validations],
    }
    write_text(folder / BEST, json.dumps(content) + "\n")


def read_history(folder: Path, step: int, pictures: Sequence[str]) -> History:
    """Return the validations of a run up to a step, for a run that goes on from there.

    They are those of these pictures, in this order; where other pictures were held out, or the file is damaged, there
    are none: losses of other pictures cannot be compared.
    """
    try:
        content = json.loads((folder / BEST).read_text(encoding="utf-8"))
        if content["pictures"] != list(pictures):
            return History()
        validations = [_validation(entry, pictures) for entry in content["validations"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return History()
    return History([one for one in validations if one.step <= step])


def _finite(validation: Validation) -> list[float | None]:
    """Return the losses in their order, None for those that JSON has no number for."""
    return [loss if math.isfinite(loss) else None for loss in validation.losses.values()]


def _validation(entry: Mapping[str, Any], pictures: Sequence[str]) -> Validation:
    losses = [math.nan if loss is None else float(loss) for loss in entry["losses"]]
    return Validation(int(entry["step"]), dict(zip(pictures, losses, strict=True)))


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return stdev(values) / math.sqrt(len(values))
