"""On which line of a TOML text each setting stands, which tomllib does not tell."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import TypeAlias

from sdtrain.config.paths import Location, plain_key

Lines: TypeAlias = Mapping[Location, int]
"""The line of each setting and section, counted from 1: of a list that of its entries too."""

_GAP = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BLANK = re.compile(r"[ \t]*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*"{3,5}' + r"|'''(?:[^']|'(?!''))*'{3,5}" + r'|"(?:[^"\\\n]|\\.)*"' + r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n\"']+")


def lines_of(text: str) -> Lines:
    """Return the lines of all settings in a TOML text that tomllib accepts.

    Of a text that cannot be followed, what was found up to there: a line that is not known is better than a wrong one.
    """
    scanner = _Scanner(text.replace("\r\n", "\n"))
    with contextlib.suppress(_LostError, RecursionError):
        scanner.document()
    return scanner.lines


def nearest_line(lines: Lines, location: Location) -> int | None:
    """Return the line of a setting, or of the section that it would stand in; None where neither is there."""
    above = (location[:end] for end in range(len(location), 0, -1))
    return next((lines[place] for place in above if place in lines), None)


class _LostError(Exception):
    """The text is not what was expected at this place."""


class _Scanner:
    """Reads a text from one end to the other; it knows no values, only where they begin and end."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Location, int] = {}
        self._text = text
        self._at = 0
        self._line = 1
        self._counted = 0
        self._entries: dict[Location, int] = {}
        """How many entries each list of tables has so far."""

    def document(self) -> None:
        """Read it all."""
        section: Location = ()
        self._pass(_GAP)
        while self._at < len(self._text):
            if self._text.startswith("[[", self._at):
                section = self._list_entry()
            elif self._text.startswith("[", self._at):
                self._expect("[")
                section = self._keys((), "]")
            else:
                self._value(self._keys(section, "="))
            self._pass(_GAP)

    def _list_entry(self) -> Location:
        self._expect("[[")
        name = self._keys((), "]]")
        index = self._entries.get(name, 0)
        self._entries[name] = index + 1
        self.lines[*name, index] = self._here()
        return (*name, index)

    def _keys(self, above: Location, end: str) -> Location:
        """Read a key with dots up to and with `end`; return where it leads, with the line for all on the way."""
        location = above
        while True:
            self._pass(_BLANK)
            line, key = self._here(), plain_key(self._take(_KEY))
            if key is None:
                raise _LostError
            location = (*location, key)
            self.lines.setdefault(location, line)
            self._pass(_BLANK)
            if not self._text.startswith(".", self._at):
                break
            self._expect(".")
            if location in self._entries:  # what follows stands in the last entry of a list of tables
                location = (*location, self._entries[location] - 1)
        self._expect(end)
        if end != "]]" and location in self._entries:
            raise _LostError
        if end == "]":
            self.lines[location] = line  # its own line, where a part of it came before
        return location

    def _value(self, location: Location) -> None:
        self._pass(_BLANK)
        match self._text[self._at : self._at + 1]:
            case "[":
                self._list(location)
            case "{":
                self._inline_table(location)
            case '"' | "'":
                self._take(_STRING)
            case _:
                self._take(_SCALAR)

    def _list(self, location: Location) -> None:
        self._expect("[")
        self._pass(_GAP)
        index = 0
        while not self._text.startswith("]", self._at):
            self.lines[*location, index] = self._here()
            self._value((*location, index))
            index += 1
            self._pass(_GAP)
            if self._text.startswith("]", self._at):
                break
            self._expect(",")
            self._pass(_GAP)
        self._expect("]")

    def _inline_table(self, location: Location) -> None:
        self._expect("{")
        self._pass(_GAP)
        while not self._text.startswith("}", self._at):
            self._value(self._keys(location, "="))
            self._pass(_GAP)
            if self._text.startswith("}", self._at):
                break
            self._expect(",")
            self._pass(_GAP)
        self._expect("}")

    def _here(self) -> int:
        """Return the line of the place that is read next."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _pass(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise _LostError
        self._at = match.end()
        return match[0]

    def _expect(self, sign: str) -> None:
        if not self._text.startswith(sign, self._at):
            raise _LostError
        self._at += len(sign)
