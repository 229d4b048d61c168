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
    """Problems the user can mend. The command line prints them all and leaves with exit code 2."""

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


def user_error(source: str, where: str, what: str) -> UserError:
    """A UserError with a single problem."""
    return UserError(source, [Problem(where, what)])
