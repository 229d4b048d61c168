"""What the user is told when something of theirs cannot work: where, what was found, what is allowed, what to do."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

MOST_PLACE = 48
"""The width of the column of places, where what is wrong begins; longer ones push it aside."""
JOINERS = "\u200c\u200d"
"""Characters without a width of their own that words and emoji are written with."""


def printable(text: str) -> str:
    """Return a text on one line, with everything that could steer a terminal or mislead a reader spelt out.

    Names, prompts and metadata are other people's. Line ends, escape codes, characters that turn the direction of
    writing and bytes that are no text are shown as Python writes them, `\\x1b`; applying it twice changes nothing more.
    """
    return "".join(char if _is_shown(char) else char.encode("unicode_escape").decode() for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or char in JOINERS or unicodedata.category(char) == "Zs"


@dataclass(frozen=True)
class Problem:
    """One mistake: `where` names the setting, file or key; `what` says the rest in one sentence.

    settings: the settings it follows from, if not from the one that `where` names alone: of a picture the folders.
    line: the line of the source that it stands on, counted from 1; None where it stands on none, or on a line that is
    not known.
    """

    where: str
    what: str
    settings: tuple[str, ...] = ()
    line: int | None = None


class UserError(Exception):
    """Problems the user can mend. The command line prints them all and leaves with `exit_code`."""

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        assert problems, "a UserError without a problem says nothing"
        self.source = source
        self.problems = tuple(problems)
        super().__init__(self.text())

    def text(self) -> str:
        """All problems, one a line, in aligned columns under the source they were found in.

        What stands on a line of the source begins with it, as `my.toml:12:`, where editors and terminals go. It can be
        shown as it is: see `printable`.
        """
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        rows = [(printable(self._place(problem)), printable(problem.what)) for problem in self.problems]
        width = min(MOST_PLACE, max(len(place) for place, _ in rows))
        lines = [f"  {place:<{width}}  {what}" for place, what in rows]
        return "\n".join([f"{printable(self.source)}: {count}", *lines])

    def _place(self, problem: Problem) -> str:
        if problem.line is None:
            return problem.where
        return f"{PurePath(self.source).name}:{problem.line}: {problem.where}"


class NotFiniteError(UserError):
    """Losses or gradients stayed not finite, so that the run had to end."""

    exit_code = 4


class OutOfMemoryError(UserError):
    """There was too little memory for a step."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """A signal ended a run before its first step or after its last, when there is nothing to save.

    It is a KeyboardInterrupt, so that whoever lets Ctrl-C through lets this through as well.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"ended by signal {number}")

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as a shell says it."""
        return 128 + self.number


def user_error(source: str, where: str, what: str) -> UserError:
    """A UserError with a single problem."""
    return UserError(source, [Problem(where, what)])
