"""All files of a folder, in an order that does not depend on the disk."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from sdtrain.data.scanning.findings import Finding
from sdtrain.errors import Problem

_LEFT_ALONE = frozenset({"@eaDir", "__MACOSX"})
"""Folders of thumbnails and resource forks that a NAS and macOS put beside pictures."""


def files_below(root: Path, exclude: Sequence[str]) -> tuple[list[Path], list[Finding]]:
    """Return all files below root in natural order, through links but never twice, and folders that cannot be read.

    Hidden ones are left out, and those that `exclude` names: by their name or their path below root, or by a pattern.
    """
    seen: set[Path] = set()
    waiting = [root]
    files: list[Path] = []
    findings: list[Finding] = []
    while waiting:
        folder = waiting.pop()
        if (real := real_path(folder)) in seen:
            continue
        seen.add(real)
        try:
            entries = [entry for entry in folder.iterdir() if not _is_left_out(entry, root, exclude)]
        except OSError as error:
            what = f"folder cannot be read: {error.strerror}; allow it, or leave it out with `exclude`"
            findings.append(Finding("folder that cannot be read", Problem(str(folder), what)))
            continue
        waiting += sorted((entry for entry in entries if entry.is_dir()), reverse=True)
        files += [entry for entry in entries if not entry.is_dir()]
    return sorted(files, key=lambda path: (natural(path, root), str(path))), findings


def natural(path: Path, root: Path) -> list[list[tuple[int, str]]]:
    """Return a key that sorts paths below root as people do: `2.png` before `10.png`, folder by folder."""
    return [_natural(part) for part in path.relative_to(root).parts]


def real_path(path: Path) -> Path:
    """Return the path without links; of links in a ring the one that was asked for, where Path.resolve may raise."""
    return Path(os.path.realpath(path))


def _is_left_out(entry: Path, root: Path, exclude: Sequence[str]) -> bool:
    if entry.name.startswith(".") or entry.name in _LEFT_ALONE:
        return True
    if not exclude:
        return False
    below = entry.relative_to(root).as_posix()
    return any(fnmatchcase(name, pattern.rstrip("/")) for pattern in exclude for name in (entry.name, below))


def _natural(name: str) -> list[tuple[int, str]]:
    """Digits count as numbers and come before letters."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if part[:1].isascii() and part.isdigit() else (-1, part) for part in parts]
