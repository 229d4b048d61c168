"""Advice in plain words: from records to sentences, without torch.

A piece of advice looks at one network after a step, and returns a sentence or None. Each is given once per network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from sdtrain.config.presets import LEAST_TRAVEL
from sdtrain.training.watching.records import GroupRecord, NoteRecord, Record, RunRecord, StepRecord

STUCK_STEPS = 100
"""The number of steps after which the user is told that d did not grow; half of the run where that is less."""
FIRST_STEPS = 10
"""The number of steps after which something must have reached every network."""
SLOW_TRAVEL = 0.01
"""A d whose steps, all of them in one direction, move a weight by less in a whole run teaches next to nothing."""
FAR_BELOW = 100
"""A d that is so many times smaller than another network's leaves its network behind."""
CLIMBED = 1.5
"""d has climbed once it has grown by this factor since the network started ..."""
DOUBLED = 2.0
"""... and runs away when it grows by this one after that, once it was at rest, or late."""


def stuck_at_d0(run: RunRecord, step: StepRecord, group: GroupRecord) -> str | None:
    """Return advice on a network whose d is still the settings' d0, which is only a first guess."""
    if not _is_unmoved(run, step, group) or group.start_d > run.d0:
        return None
    found = f"note: after {step.step} steps d of {group.name} is still d0 = {run.d0:.0e}"
    likely = "captions that do not fit the pictures, or gradients that cancel in a very small batch"
    if run.d0 * run.steps >= SLOW_TRAVEL:
        return (
            f"{found}. It learns at that pace, which may be right. If the previews do not change, look for {likely}, "
            "and if they change too much, set a smaller optimizer.d0."
        )
    return (
        f"{found}, so it learns next to nothing. Likely: {likely}, or d0 too small for so few steps (try "
        "optimizer.d0 = 1e-4)."
    )


def stuck_at_stored_d(run: RunRecord, step: StepRecord, group: GroupRecord) -> str | None:
    """Return advice on a network whose d is still that of the file in `method.init_from`, which may well be enough."""
    if not _is_unmoved(run, step, group) or group.start_d <= run.d0:
        return None
    return (
        f"note: after {step.step} steps d of {group.name} is still that of the file in method.init_from "
        f"({group.start_d:.1e}). It learns at the file's pace, which is often right. If the previews do not change, "
        "look for captions that do not fit the pictures, or gradients that cancel in a very small batch."
    )


def frozen_while_climbing(run: RunRecord, step: StepRecord, group: GroupRecord) -> str | None:
    """Return advice on a network whose d was not yet what it was going to be when `prodigy_steps` fixed it."""
    if group.stopped or not (group.frozen and group.climbing):
        return None
    return (
        f"note: d of {group.name} was still climbing when optimizer.prodigy_steps froze it at {group.d:.1e}, so it "
        "learns too slowly; leave prodigy_steps to the preset, which freezes d at rest "
        "(`--resume --set optimizer.prodigy_steps=auto`)."
    )


def climbing_at_the_end(run: RunRecord, step: StepRecord, group: GroupRecord) -> str | None:
    """Return advice on a network whose d was not yet what it was going to be when the run ended."""
    if group.stopped or group.frozen or not group.climbing or step.step < run.steps:
        return None
    return (
        f"note: d of {group.name} was still climbing when the run ended, at {group.d:.1e}: {run.steps} steps are too "
        "few to find it; go on with more steps, or start from a larger optimizer.d0."
    )


def frozen_too_small(run: RunRecord, step: StepRecord, group: GroupRecord) -> str | None:
    """Return advice on a network whose d is fixed at a value that moves no weight, or far below another network's."""
    if group.stopped or not group.frozen or group.climbing:
        return None
    travel = group.applied_d * run.steps
    largest = max(step.groups, key=lambda other: other.applied_d)
    if travel < LEAST_TRAVEL:
        why = f"in all {run.steps} steps that moves a weight by {travel:.0e} at most"
    elif group.applied_d * FAR_BELOW < largest.applied_d:
        why = f"that of {largest.name} is {largest.applied_d:.1e}"
    else:
        return None
    return (
        f"note: d of {group.name} is frozen at {group.applied_d:.1e}, which is useless: {why}. Let it grow on "
        "(`--resume --set optimizer.prodigy_steps=0 --set optimizer.freeze_share=0`), or start again from a larger "
        "optimizer.d0."
    )


def weight_that_waited(run: RunRecord, step: StepRecord, group: GroupRecord) -> str | None:
    """Return advice on a network whose weight never counted, because the run ended before its d was at rest.

    One that nobody chose is not told of: that d was still climbing is.
    """
    if group.stopped or group.settled or group.weight in (1, run.usual_weight) or step.step < run.steps:
        return None
    return (
        f"note: the weight of {group.name} ({group.weight:g}, of method.lr, optimizer.lr and optimizer.d_coef) did not "
        "count when the run ended: it waits until d is at rest; train for more steps, or start from a larger "
        "optimizer.d0."
    )


@dataclass
class NoGradient:
    """Advice on a network that no gradient has reached in the first steps. It remembers which ones were reached."""

    reached: set[str] = field(default_factory=set)

    def __call__(self, run: RunRecord, step: StepRecord, group: GroupRecord) -> str | None:
        """Return the advice, None where there is none."""
        if group.gradient > 0 or group.skipped or group.stopped:
            self.reached.add(group.name)
        if group.name in self.reached or step.step < _after_first_steps(run):
            return None
        return (
            f"note: {group.name} got no gradient in {step.step - run.first_step} steps, so it does not learn: nothing "
            "that the loss is made of depends on it. Take it out of method.train; or, for a text encoder, see whether "
            "data.caption_dropout leaves all captions out."
        )


def up_still_zero(run: RunRecord, step: StepRecord, group: GroupRecord) -> str | None:
    """Return advice on a network whose adapters are as they began though gradients were made for it."""
    if not group.at_zero or group.stopped or step.step < _after_first_steps(run):
        return None
    if group.skipped or not group.gradient:
        return None  # steps that were left out, and a network without gradient, are told of as that
    return (
        f"note: the up matrices of {group.name} are still zero after {step.step} steps, so it changes no picture: no "
        "gradient reaches them. Train without method.init_from, or with another adapter."
    )


@dataclass
class RunningAway:
    """Advice on a network whose d doubles after it had been at rest, or late. It remembers d as it was then."""

    before: dict[str, tuple[float, int]] = field(default_factory=dict)

    def __call__(self, run: RunRecord, step: StepRecord, group: GroupRecord) -> str | None:
        """Return the advice, None where there is none."""
        if group.name not in self.before:
            late = 2 * step.step >= run.steps and not group.climbing
            if _found(group) > CLIMBED * group.start_d and (group.settled or late):
                self.before[group.name] = (_found(group), step.step)
            return None
        d, since = self.before[group.name]
        if group.frozen or _found(group) < DOUBLED * d:
            return None
        return (
            f"note: d of {group.name} doubled late, from {d:.1e} at step {since} to {_found(group):.1e}: it may run "
            "away. Look at the previews; if they get worse, start again with a smaller optimizer.d_coef, or with "
            f"optimizer.prodigy_steps = {since}, which freezes it there."
        )


def _is_unmoved(run: RunRecord, step: StepRecord, group: GroupRecord) -> bool:
    """Whether d was to grow and did not since the network started; not before enough steps were seen.

    Where no gradient was made, that is what is told of; d at the value that was given for good is no guess.
    """
    waited = min(STUCK_STEPS, max(FIRST_STEPS, (run.steps - run.first_step) // 2))
    if step.step < run.first_step + waited or group.stopped or group.given or not group.gradient:
        return False
    return _found(group) <= group.start_d * (1 + 1e-6)


def _found(group: GroupRecord) -> float:
    """Return d without the factor that is put on it, which may come to count at any step."""
    return group.found_d or group.d


def _after_first_steps(run: RunRecord) -> int:
    """Return the step after which something must have reached every network: the last one of a shorter run."""
    return min(run.steps, run.first_step + FIRST_STEPS)


Advice: TypeAlias = Callable[[RunRecord, StepRecord, GroupRecord], str | None]


def all_advice() -> list[Advice]:
    """Return every piece of advice, as at the start of a run."""
    return [
        NoGradient(),
        up_still_zero,
        stuck_at_d0,
        stuck_at_stored_d,
        frozen_while_climbing,
        frozen_too_small,
        RunningAway(),
        climbing_at_the_end,
        weight_that_waited,
    ]


class Adviser:
    """Gives each piece of advice at most once per network: it remembers the run, and what was given."""

    def __init__(self, advice: Iterable[Advice] | None = None) -> None:
        self._run: RunRecord | None = None
        self._advice = list(all_advice() if advice is None else advice)
        self._given: set[tuple[int, str]] = set()

    def notes(self, record: Record) -> list[NoteRecord]:
        """Return the advice that a record gives rise to, most often none."""
        if isinstance(record, RunRecord):
            self._run = record
        if not isinstance(record, StepRecord) or self._run is None:
            return []
        notes = []
        for number, advice in enumerate(self._advice):
            for group in record.groups:
                if (number, group.name) not in self._given and (text := advice(self._run, record, group)) is not None:
                    self._given.add((number, group.name))
                    notes.append(NoteRecord(record.step, text))
        return notes
