"""What the user is told when something of theirs cannot work: where, what was found, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: `where` names the setting, file or key; `what` says the rest in one sentence.

    settings: the settings it follows from, if not from the one that `where` names alone: of a picture the folders.
    """

    where: str
    what: str
    settings: tuple[str, ...] = ()


class UserError(Exception):
    """Problems the user can mend. The command line prints them all and leaves with `exit_code`."""

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        assert problems, "a UserError without a problem says nothing"
        self.source = source
        self.problems = tuple(problems)
        super().__init__(self.text())

    def text(self) -> str:
        """All problems, one a line, in aligned columns under the source they were found in."""
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        width = min(40, max(len(problem.where) for problem in self.problems))
        lines = [f"  {problem.where:<{width}}  {problem.what}" for problem in self.problems]
        return "\n".join([f"{self.source}: {count}", *lines])


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
