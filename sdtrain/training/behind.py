"""A training state that is written while the training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from sdtrain.files.host import free_bytes
from sdtrain.training.keeping.states import Numbers

SHARE_OF_MEMORY = 0.25
"""The most that a copy of a state takes of the memory that is free."""
MUCH_BYTES = 2 * 2**30
"""What counts as much where nobody knows how much memory is free."""


class Behind:
    """Writes one state at a time, from a copy of its numbers, in a thread that does not keep a process from ending."""

    def __init__(self) -> None:
        self._done: Future[Path] | None = None
        self.step = 0
        """The step of the state that was written last, or is written now."""

    @staticmethod
    def has_room_for(numbers: Numbers) -> bool:
        """Return whether a copy of these numbers leaves enough memory."""
        free = free_bytes()
        return numbers.num_bytes <= (MUCH_BYTES if free is None else SHARE_OF_MEMORY * free)

    def begin(self, step: int, write: Callable[[], Path]) -> None:
        """Begin to write the state of a step; that of before must be done."""
        assert self._done is None, "one state is written at a time"
        self.step, self._done = step, Future()
        Thread(target=_run, args=(write, self._done), name="writes a training state", daemon=True).start()

    @property
    def is_done(self) -> bool:
        """Whether a state was written, or could not be, of which nobody was told yet."""
        return self._done is not None and self._done.done()

    def end(self) -> Path | None:
        """Wait until the state is written; return its folder, None where none was begun. Raises what writing raised."""
        done, self._done = self._done, None
        return None if done is None else done.result()


def _run(write: Callable[[], Path], done: Future[Path]) -> None:
    try:
        done.set_result(write())
    except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
        done.set_exception(error)
