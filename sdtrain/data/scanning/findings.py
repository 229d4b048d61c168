"""What is wrong with a folder, sorted, so that a hundred of one sort do not hide the one of another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sdtrain.errors import Problem

MAX_ALIKE = 12


@dataclass(frozen=True)
class Finding:
    """A problem and the sort it is of: a hundred of one sort must not hide the one of another."""

    sort: str
    problem: Problem


def shortened(findings: Sequence[Finding]) -> list[Problem]:
    """The problems in their order; of each sort at most MAX_ALIKE and a line that counts the others."""
    by_sort: dict[str, list[Problem]] = defaultdict(list)
    for finding in findings:
        by_sort[finding.sort].append(finding.problem)
    problems: list[Problem] = []
    for sort, alike in by_sort.items():
        problems += alike[:MAX_ALIKE]
        if len(alike) > MAX_ALIKE:
            problems.append(Problem("...", f"and {len(alike) - MAX_ALIKE} more like this: {sort}"))
    return problems
