"""Consoles: one that may go away, when what is shown is lost and the training is not; one for plain letters alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO, cast

from rich.console import Console


@dataclass(frozen=True)
class Consoles:
    """Where a command shows how it goes, and where it tells what came of it."""

    progress: Console
    result: Console


def consoles(*, plain: bool = False, quiet: bool = False) -> Consoles:
    """Return the consoles of a command.

    plain: whether lines of ASCII are printed now and then, without colours, where a display would be drawn anew.
    quiet: whether nothing but the result is told.
    """
    result = Console(file=cast(TextIO, Ascii(sys.stdout)), force_terminal=False, no_color=True) if plain else Console()
    return Consoles(Console(quiet=True, force_terminal=False) if quiet else result, result)


class Ascii:
    """A text stream that is handed letters of ASCII alone: what is none is spelt out as in Python."""

    encoding = "ascii"
    """By which rich draws frames and bars of plain signs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what of the text is ASCII, and the rest spelt out."""
        self._stream.write(text.replace("±", "+-").encode("ascii", "backslashreplace").decode("ascii"))
        return len(text)

    def flush(self) -> None:
        """Flush."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Return that nothing can be drawn anew."""
        return False

    def fileno(self) -> int:
        """Return the stream's number."""
        return self._stream.fileno()


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
        if self._stream in (sys.__stdout__, sys.__stderr__) or isinstance(self._stream, Ascii):
            # What is still in its buffer would fail once more at the end of the process, and turn its exit code to 120.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def outliving(*consoles: Console) -> Iterator[None]:
    """Let whatever is shown on the consoles be lost, within the block, once their streams are gone."""
    before = [(console, cast(TextIO, console.file)) for console in dict.fromkeys(consoles)]
    for console, stream in before:
        console.file = cast(TextIO, Outliving(stream))
    try:
        yield
    finally:
        for console, stream in before:
            console.file = stream
