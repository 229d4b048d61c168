"""Hands the records of a run to a tracker, under names that all trackers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdtrain.config.schema import TrackerName, TrackingConfig
from sdtrain.training.watching.records import (
    EndRecord,
    PictureRecord,
    Record,
    RunRecord,
    StepRecord,
    ValidationRecord,
    Watcher,
)
from sdtrain.training.watching.tracking.trackers import Tracker, finite, open_tracker


class TrackerWatcher:
    """One tracker as a watcher. It raises what the tracker raises: then it is dropped, which is told once."""

    def __init__(self, name: TrackerName, begin: Callable[[RunRecord], Tracker]) -> None:
        self._name, self._begin = name, begin
        self._tracker: Tracker | None = None

    def __call__(self, record: Record) -> None:
        """Hand a record on where the tracker takes what it tells."""
        if isinstance(record, RunRecord):
            self._tracker = self._begin(record)
        tracker = self._tracker
        if tracker is None:
            return
        match record:
            case StepRecord():
                tracker.numbers(record.step, step_numbers(record))
            case ValidationRecord():
                found = {"validation/loss": record.loss, "validation/standard_error": record.standard_error}
                tracker.numbers(record.step, finite(found))
            case PictureRecord():
                tracker.picture(record.step, record.path)
            case EndRecord():
                tracker.end()
            case _:
                pass  # notes and saved files are in the log and the report

    def __str__(self) -> str:
        return self._name


def step_numbers(record: StepRecord) -> dict[str, float]:
    """Return what is finite of a step, by name: `loss`, `images_per_s`, and `d/unet` and the like of each network."""
    groups = {
        f"{what}/{group.name}": value
        for group in record.groups
        for what, value in (("d", group.d), ("applied_d", group.applied_d), ("effective_lr", group.effective_lr))
    }
    return finite(
        {
            "loss": record.loss,
            "images_per_s": record.images_per_s,
            "peak_memory_gib": record.peak_memory_gib,
            **groups,
        }
    )


def trackers(config: TrackingConfig) -> Sequence[Watcher]:
    """Return a watcher for each tracker that a run writes to; none has begun."""
    return [_of(name, config.project) for name in dict.fromkeys(config.to)]


def _of(name: TrackerName, project: str) -> TrackerWatcher:
    return TrackerWatcher(name, lambda run: open_tracker(name, run, project))
