"""Hands every record to everybody who watches; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import BuiltinFunctionType, FunctionType, MethodType

from rich.console import Console

from sdtrain.training.watching.advice import Adviser
from sdtrain.training.watching.log import Log, log_to
from sdtrain.training.watching.records import EndRecord, NoteRecord, Record, RunRecord, Watcher
from sdtrain.training.watching.screen import Screen
from sdtrain.training.watching.tracking.watcher import TrackerWatcher


class Watchers:
    """Everybody who watches a run: the log, the screen and other people's watchers. None of them can end it."""

    def __init__(self, log: Log | None, others: Sequence[Watcher]) -> None:
        self._log = log
        self._log_is_behind = False
        self._others = list(others)
        self._adviser = Adviser()
        self.step = 0
        """The number of steps that are done, by the last record."""

    def tell(self, record: Record) -> None:
        """Hand a record to all watchers, the log first, and then hand them the notes that it gives rise to.

        A watcher that raises is dropped, and that is told once. A log that cannot be written catches up later.
        """
        self.step = record.first_step if isinstance(record, RunRecord) else record.step
        notes = self._write(record)
        notes += [note for watcher in tuple(self._others) if (note := self._try(watcher, record))]
        for note in (*notes, *self._adviser.notes(record)):
            self.tell(note)

    def keep_log(self) -> None:
        """Make the log so far outlive a power cut: what a training state says was done is to stand there as well."""
        if self._log is not None:
            with suppress(OSError):  # who only looks ends no run, and no save either
                self._log.flush()

    def _write(self, record: Record) -> list[NoteRecord]:
        if self._log is None:
            return []
        try:
            self._log.see(record)
        except OSError as error:
            was_behind, self._log_is_behind = self._log_is_behind, True
            text = (
                f"note: log.jsonl cannot be written ({error.strerror or error}); the training goes on, and the lines "
                "are written as soon as they can be"
            )
            return [] if was_behind else [NoteRecord(self.step, text)]
        return []

    def _try(self, watcher: Watcher, record: Record) -> NoteRecord | None:
        try:
            watcher(record)
        except Exception as error:  # noqa: BLE001 - who only looks must not end the run, which could lose hours
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
        case TrackerWatcher():
            name = str(watcher)
        case FunctionType() | MethodType() | BuiltinFunctionType():
            name = watcher.__qualname__
        case _:
            name = type(watcher).__qualname__
    return name.rpartition("<locals>.")[2]


@contextmanager
def watching(
    run: RunRecord, console: Console, others: Sequence[Watcher], *, somebody_else: bool = False
) -> Iterator[Watchers]:
    """Give the watchers of a run: log, screen, then `others`. An error ends the run for them too.

    somebody_else: whether another process of the run tells and writes; here nobody watches then.
    """
    if somebody_else:
        yield Watchers(None, ())
        return
    with log_to(run.folder / "log.jsonl", run.first_step) as log, Screen(console, run) as screen:
        watchers = Watchers(log, [screen.see, *others])
        watchers.tell(run)
        try:
            yield watchers
        except BaseException:
            watchers.tell(EndRecord(watchers.step, "failed"))
            raise
