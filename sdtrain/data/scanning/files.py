"""All files of a folder, in an order that does not depend on the disk."""

from __future__ import annotations

import re
from pathlib import Path


def files_below(root: Path) -> list[Path]:
    """All files below root in natural order, through links but never twice; hidden ones are left out."""
    seen: set[Path] = set()
    waiting = [root]
    files: list[Path] = []
    while waiting:
        folder = waiting.pop()
        if (real := folder.resolve()) in seen:
            continue
        seen.add(real)
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        waiting += sorted((entry for entry in entries if entry.is_dir()), reverse=True)
        files += [entry for entry in entries if not entry.is_dir()]
    return sorted(files, key=lambda path: ([_natural(part) for part in path.relative_to(root).parts], str(path)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `2.png` before `10.png`: digits count as numbers and come before letters."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if part[:1].isascii() and part.isdigit() else (-1, part) for part in parts]
