"""Folders named as sd-scripts has them: `10_sks dog`, seen 10 times, of a sks dog."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sdtrain.data.captions.text import normalise

_NAME = re.compile(r"([1-9][0-9]{0,5})_(.*\w.*)", flags=re.DOTALL)


@dataclass(frozen=True)
class Concept:
    """What the name of a folder stands for."""

    folder: str
    repeats: int
    words: str


def concept_of(picture: Path, root: Path) -> Concept | None:
    """Return what the nearest folder of such a name says of a picture, from its own up to root; None: nothing."""
    folder = picture.parent
    while True:
        if match := _NAME.fullmatch(folder.name):
            return Concept(folder.name, int(match[1]), normalise(match[2]))
        if folder == root or folder == folder.parent:
            return None
        folder = folder.parent
