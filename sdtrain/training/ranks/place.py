"""Which of several processes this one is, as launchers such as torchrun say it in the environment. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdtrain.errors import Problem, UserError

NAMES = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "TORCHELASTIC_RESTART_COUNT": 0}
"""The variables that launchers set, and what they are where none does."""


@dataclass(frozen=True)
class Place:
    """One process of a run.

    rank: its number, from 0. size: how many there are. local_rank: its number on its machine, which picks its device.
    attempt: how often the launcher has started all of them again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    attempt: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def place_of(environment: Mapping[str, str]) -> Place:
    """Return the place that the environment names. Raises UserError where it makes no sense."""
    problems = []
    found = {}
    for name, usual in NAMES.items():
        text = environment.get(name, str(usual))
        found[name] = int(text) if text.isdecimal() else usual
        if not text.isdecimal():
            problems.append(Problem(name, f"is {text!r}, not a whole number; a launcher such as torchrun sets it"))
    place = Place(*(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")))
    if place.size > 1:
        lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        problems += [
            Problem(
                name,
                f"is not set, though WORLD_SIZE is {place.size}: start the run as `sdtrain fit CONFIG --gpus N` or "
                "with torchrun, or unset WORLD_SIZE",
            )
            for name in lacking
        ]
    if not problems and not 0 <= place.rank < max(1, place.size):
        problems.append(Problem("RANK", f"is {place.rank}, but WORLD_SIZE is {place.size}: ranks count from 0"))
    if problems:
        raise UserError("the environment", problems)
    return place
