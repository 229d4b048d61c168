"""Which training states stay: the last few, every so many steps, the best, and never fewer good ones than asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from sdtrain.config.schema import CheckpointConfig
from sdtrain.files.temporary import remove
from sdtrain.files.writer import remove_folder, rename_folder, write_text
from sdtrain.training.keeping.manifest import SavedState, saved_states

BEST = "best.json"
PASSED_OVER = re.compile(r"passed-over-step-(\d{6,18})")
"""The names of states that a run did not go on from, for example because they are damaged."""


def mark_best(folder: Path, step: int) -> None:
    """Note that the state of a step is the best one so far; it is never removed while it is. Raises UserError."""
    write_text(folder / BEST, json.dumps({"step": step}))


def best_step(folder: Path) -> int | None:
    """Return the step that was marked as the best one; None where there is none, or the mark cannot be read."""
    try:
        step = json.loads((folder / BEST).read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def superfluous(
    states: Sequence[SavedState], step: int, settings: CheckpointConfig, best: int | None
) -> list[SavedState]:
    """Return the states that need not stay once that of `step` was saved, oldest first.

    States of later steps, which a run that went back has not reached again, neither count nor go. States that were
    taken while the loss was not finite count for nothing: the newest stays beside the good ones until a good one
    follows, the others go.
    """
    there = [state for state in states if state.step <= step]
    good = [state for state in there if state.loss_was_finite]
    doubtful = [state for state in there if not state.loss_was_finite]
    last = [state for state in doubtful[-1:] if not good or state.step > good[-1].step]
    stays = {state.step for state in (*good[-settings.keep :], *last)} | {best}
    if settings.keep_every:
        stays |= {state.step for state in good if state.step % settings.keep_every == 0}
    return [state for state in there if state.step not in stays]


def remove_superfluous(folder: Path, step: int, settings: CheckpointConfig) -> None:
    """Remove the states that need not stay now that a whole one of `step` is there. Raises OSError."""
    for state in superfluous(saved_states(folder), step, settings, best_step(folder)):
        remove_folder(state.folder)
    for entry in list(folder.iterdir()):
        if (found := PASSED_OVER.fullmatch(entry.name)) and int(found[1]) <= step:
            remove(entry)  # it was kept until the run was here again


def pass_over(state: Path) -> None:
    """Give a state that is not gone on from a name that says so; another one of its step goes. Raises UserError."""
    rename_folder(state, f"passed-over-{state.name}")
