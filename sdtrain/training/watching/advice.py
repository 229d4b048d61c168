"""Advice in plain words: from records to sentences, without torch.

A piece of advice is a function from the run and a step to a sentence or None. Each is given once per run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from sdtrain.training.watching.records import GroupRecord, NoteRecord, Record, RunRecord, StepRecord

STUCK_STEPS = 100
"""The number of steps after which the user is told that d did not grow."""


def stuck_at_d0(run: RunRecord, step: StepRecord) -> str | None:
    """Return advice on networks whose d is still the settings' d0, which is only a first guess; None without any."""
    stuck = [group.name for group in _unmoved(run, step) if group.start_d <= run.d0]
    if not stuck:
        return None
    return (
        f"note: after {step.step} steps d of {', '.join(stuck)} is still d0 = {run.d0:.0e}, so it learns next to "
        "nothing. Likely: captions that do not fit the pictures, d0 too small for so few steps (try "
        "optimizer.d0 = 1e-5), or gradients that cancel in a very small batch."
    )


def stuck_at_stored_d(run: RunRecord, step: StepRecord) -> str | None:
    """Return advice on networks whose d is still that of the file in `method.init_from`, which may well be enough.

    None where there is no such network.
    """
    stuck = [group for group in _unmoved(run, step) if group.start_d > run.d0]
    if not stuck:
        return None
    values = ", ".join(f"{group.name} ({group.d:.1e})" for group in stuck)
    return (
        f"note: after {step.step} steps d is still that of the file in method.init_from: {values}. It learns at the "
        "file's pace, which is often right. If the previews do not change, look at captions that do not fit the "
        "pictures, or at gradients that cancel in a very small batch."
    )


def still_climbing(run: RunRecord, step: StepRecord) -> str | None:
    """Networks whose d was not yet what it was going to be when the run ended, or when `prodigy_steps` fixed it."""
    climbing = [group for group in step.groups if group.climbing and not group.stopped]
    fixed = [group for group in climbing if group.frozen]
    if fixed:
        values = ", ".join(f"{group.name} ({group.d:.1e})" for group in fixed)
        return (
            f"note: d was still climbing when optimizer.prodigy_steps froze it: {values}. It learns too slowly; leave "
            "prodigy_steps to the preset, which freezes d at rest (`--resume --set optimizer.prodigy_steps=auto`)."
        )
    if not climbing or step.step < run.steps:
        return None
    values = ", ".join(f"{group.name} ({group.d:.1e})" for group in climbing)
    return (
        f"note: d was still climbing when the run ended: {values}. {run.steps} steps are too few to find it; go on "
        "with more steps, or start from a larger optimizer.d0."
    )


def _unmoved(run: RunRecord, step: StepRecord) -> list[GroupRecord]:
    """Return the networks whose d may grow and did not since they started; none before enough steps were seen."""
    if step.step < run.first_step + STUCK_STEPS:
        return []
    return [group for group in step.groups if group.d <= group.start_d * (1 + 1e-6) and not group.frozen]


Advice: TypeAlias = Callable[[RunRecord, StepRecord], str | None]
ADVICE: tuple[Advice, ...] = (stuck_at_d0, stuck_at_stored_d, still_climbing)


class Adviser:
    """Gives each piece of advice at most once: it remembers the run and what is still to be given."""

    def __init__(self, advice: Sequence[Advice] = ADVICE) -> None:
        self._run: RunRecord | None = None
        self._waiting = list(advice)

    def notes(self, record: Record) -> list[NoteRecord]:
        """Return the advice that a record gives rise to, most often none."""
        if isinstance(record, RunRecord):
            self._run = record
        if not isinstance(record, StepRecord) or self._run is None:
            return []
        notes = []
        for advice in tuple(self._waiting):
            text = advice(self._run, record)
            if text is not None:
                self._waiting.remove(advice)
                notes.append(NoteRecord(record.step, text))
        return notes
