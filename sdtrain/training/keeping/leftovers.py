"""What kills have left in the folder of a run, and a user's copies, which are none of it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from sdtrain.files.temporary import remove, remove_left_overs
from sdtrain.training.keeping.manifest import CONFIG, INDEX, OPTIMIZER, PARAMETERS, PICTURES, state_folders

OF_BEFORE = re.compile(r"\.step-\d+\.partial|\..+\.safetensors\.\d+\.part")
"""The names that earlier versions gave to what was not finished."""
OURS = {INDEX, PARAMETERS, OPTIMIZER, CONFIG, PICTURES}


def remove_leftovers(run: Path) -> list[Path]:
    """Remove what killed processes left in the folder of a run; return the whole folders of states among it.

    These are states whose removal was cut: they have no index any more, and nothing that we did not write. Only the
    process that holds the run may call this. What cannot be removed stays: that is no reason not to train.
    """
    for folder in (run, run / "checkpoints", run / "weights", run / "previews"):
        if folder.is_dir():
            remove_left_overs(folder)
            for entry in [entry for entry in folder.iterdir() if OF_BEFORE.fullmatch(entry.name)]:
                with contextlib.suppress(OSError):
                    remove(entry)
    cut = [folder for _, folder in state_folders(run / "checkpoints") if _is_cut(folder)]
    for folder in cut:
        remove(folder)
    return cut


def _is_cut(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return INDEX not in names and names <= OURS
