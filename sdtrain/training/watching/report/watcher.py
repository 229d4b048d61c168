"""Keeps `report.html` up to date while a run trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sdtrain.training.watching.records import EndRecord, PictureRecord, Record, RunRecord, StepRecord, ValidationRecord
from sdtrain.training.watching.report.about import About, write_about
from sdtrain.training.watching.report.page import write_page
from sdtrain.training.watching.report.pictures import Shelf

EVERY_S = 60.0
"""How often the page is written where nothing is there to see but steps."""
SHARE = 0.02
"""The most of a run's time that the page may take: after a slow one the next waits longer."""


class ReportWriter:
    """Writes the page at pictures, validations and the end, at times between them, and never more than it may cost."""

    def __init__(self, folder: Path, about: About, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._about, self._clock = folder, about, clock
        self._shelf = Shelf()
        self._not_before = self._due_at = clock()

    def see(self, record: Record) -> None:
        """Write the page where a record is worth it. Raises UserError when it cannot be written."""
        match record:
            case RunRecord():
                write_about(self._folder, self._about)
            case EndRecord():
                self._write(record.outcome)
            case PictureRecord() | ValidationRecord():
                if self._clock() >= self._not_before:
                    self._write("running")
                else:
                    self._due_at = self._not_before
            case StepRecord():
                if self._clock() >= max(self._due_at, self._not_before):
                    self._write("running")
            case _:
                pass  # notes and saved files are on the next page

    def _write(self, outcome: str) -> None:
        began = self._clock()
        write_page(self._folder, outcome, self._shelf)
        ended = self._clock()
        self._not_before = ended + (ended - began) * (1 / SHARE - 1)
        self._due_at = ended + EVERY_S
