"""Finds the state that a run goes on from: the newest one that is whole and of a sound training. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import user_error
from sdtrain.training.keeping.manifest import DamagedError, SavedState, read_index, require_whole, state_folders


@dataclass(frozen=True)
class Newest:
    """The state to go on from, None where there is none; and the later ones that are passed over, with the reasons."""

    state: SavedState | None
    passed_over: tuple[tuple[Path, str], ...]

    def notes(self) -> list[str]:
        """Return a sentence for each state that is passed over."""
        instead = "" if self.state is None else f"; going on from step {self.state.step} instead"
        return [f"{folder} is passed over: {reason}{instead}" for folder, reason in self.passed_over]


def find_newest(folder: Path) -> Newest:
    """Return the newest whole state under `folder`. Files are read to the end, until one state is whole.

    A state that was taken while the loss was not finite is passed over for an earlier one that was not; where there is
    none, it is what there is. Raises UserError where there are states and not one of them is whole: to begin anew as if
    there were none would lose what may yet be saved.
    """
    passed_over: list[tuple[Path, str]] = []
    doubtful: tuple[SavedState, int] | None = None  # the newest, and how many were passed over before it
    for step, entry in reversed(state_folders(folder)):
        try:
            state = read_index(entry, step)
            require_whole(state)
        except DamagedError as error:
            passed_over.append((entry, f"it is damaged ({error})"))
            continue
        if state.loss_was_finite:
            return Newest(state, tuple(passed_over))
        doubtful = doubtful or (state, len(passed_over))
        passed_over.append((entry, "it was taken while the loss was not finite"))
    if doubtful is not None:
        return Newest(doubtful[0], tuple(passed_over[: doubtful[1]]))
    if passed_over:
        found = "; ".join(f"{entry.name}: {reason}" for entry, reason in passed_over)
        what = f"not one is whole ({found}); move {folder} away to begin anew, or bring back a copy"
        raise user_error(str(folder), "training states", what)
    return Newest(None, ())
