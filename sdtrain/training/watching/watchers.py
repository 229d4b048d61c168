"""Hands every record to everybody who watches; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType

from rich.console import Console

from sdtrain.training.watching.advice import Adviser
from sdtrain.training.watching.log import log_to
from sdtrain.training.watching.records import EndRecord, NoteRecord, Record, RunRecord, Watcher
from sdtrain.training.watching.screen import Screen


class Watchers:
    """Everybody who watches a run: our own watchers, and other people's, which may fail without harm to it."""

    def __init__(self, own: Sequence[Watcher], others: Sequence[Watcher]) -> None:
        self._own = tuple(own)
        self._others = list(others)
        self._adviser = Adviser()
        self.step = 0
        """The number of steps that are done, by the last record."""

    def tell(self, record: Record) -> None:
        """Hand a record to all watchers, our own first, and then hand them the notes that it gives rise to.

        A watcher of somebody else that raises is dropped, and that is told once. An error of our own, such as a
        log on a full disk, is raised.
        """
        self.step = record.first_step if isinstance(record, RunRecord) else record.step
        for watcher in self._own:
            watcher(record)
        failures = [note for watcher in tuple(self._others) if (note := self._try(watcher, record))]
        for note in (*failures, *self._adviser.notes(record)):
            self.tell(note)

    def _try(self, watcher: Watcher, record: Record) -> NoteRecord | None:
        try:
            watcher(record)
        except Exception as error:  # noqa: BLE001 - it is not our code: letting it end the run could lose hours
            self._others = [other for other in self._others if other is not watcher]
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return NoteRecord(
                self.step,
                f"note: the watcher {name_of(watcher)} failed after step {self.step} ({what}), so it sees no more of "
                "this run; the training is as it would be without it",
            )
        return None


def name_of(watcher: Watcher) -> str:
    """Return what a person would call a watcher: the name of a function or method, the class of anything else."""
    match watcher:
        case FunctionType() | MethodType() | BuiltinFunctionType():
            name = watcher.__qualname__
        case _:
            name = type(watcher).__qualname__
    return name.rpartition("<locals>.")[2]


@contextmanager
def watching(run: RunRecord, console: Console, others: Sequence[Watcher]) -> Iterator[Watchers]:
    """Give the watchers of a run: log, screen, then `others`. An error ends the run for them too."""
    with log_to(run.folder / "log.jsonl", run.first_step) as log, Screen(console, run) as screen:
        watchers = Watchers([log, screen.see], others)
        watchers.tell(run)
        try:
            yield watchers
        except BaseException:
            watchers.tell(EndRecord(watchers.step, "failed"))
            raise
