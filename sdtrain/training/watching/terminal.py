"""A console that may go away: what is shown is lost then, and the training is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from rich.console import Console


class Outliving:
    """A text stream that falls silent when nobody takes what is written: a closed pipe, a terminal that hung up."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_gone = False

    def write(self, text: str) -> int:
        """Write, or drop the text once the stream is gone."""
        if not self.is_gone:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # ValueError: the stream was closed
                self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush, unless the stream is gone."""
        if not self.is_gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal that is still there."""
        return not self.is_gone and self._stream.isatty()

    def fileno(self) -> int:
        """Return the stream's number, by which rich finds out the size of the terminal."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return self._stream.encoding or "utf-8"

    def _give_up(self) -> None:
        self.is_gone = True
        if self._stream in (sys.__stdout__, sys.__stderr__):
            # What is still in its buffer would fail once more at the end of the process, and turn its exit code to 120.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def outliving(console: Console) -> Iterator[None]:
    """Let whatever is shown on the console be lost, within the block, once its stream is gone."""
    before = cast(TextIO, console.file)
    console.file = cast(TextIO, Outliving(before))
    try:
        yield
    finally:
        console.file = before
