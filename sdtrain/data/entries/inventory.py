"""What lies in the folder of the cache, and removing what nobody needs. Nothing but entries is ever touched."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import user_error
from sdtrain.files import temporary

KINDS = ("latents", "masks", "captions")
ENTRY = re.compile(r"[0-9a-f]{40}\.safetensors")
UNFINISHED = re.compile(r"\.[0-9a-f]{40}\..+\.partial")
UNFINISHED_BEFORE = re.compile(r"\.[0-9a-f]{40}\.\d+\.[0-9a-f]{8}\.tmp")
"""The name that earlier versions gave to what was not finished."""
UNTOUCHED_S = 3600.0


@dataclass(frozen=True)
class Inventory:
    """The files of a cache, each with its size in bytes.

    entries: what is whole by its name. left_over: what killed processes did not finish.
    """

    entries: Mapping[Path, int]
    left_over: Mapping[Path, int]


def take_inventory(cache: Path) -> Inventory:
    """Return what lies in a cache; links, and files and folders with other names, are none of it."""
    entries: dict[Path, int] = {}
    left_over: dict[Path, int] = {}
    for file in _files(cache):
        path = Path(file.path)
        if ENTRY.fullmatch(file.name) and file.name[:2] == path.parent.name:
            entries[path] = file.stat(follow_symlinks=False).st_size
        elif _is_left_over(path):
            left_over[path] = file.stat(follow_symlinks=False).st_size
    return Inventory(entries, left_over)


def remove_entries(paths: Iterable[Path]) -> None:
    """Remove files of an inventory; it is no error when one is gone already. Raises UserError."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise user_error("cache", str(path), f"cannot be removed: {error.strerror or error}") from error


def _files(cache: Path) -> Iterator[os.DirEntry[str]]:
    for kind in KINDS:
        for folder in _listed(cache / kind):
            if re.fullmatch(r"[0-9a-f]{2}", folder.name) and folder.is_dir(follow_symlinks=False):
                yield from (file for file in _listed(Path(folder.path)) if file.is_file(follow_symlinks=False))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise user_error("cache", str(folder), f"cannot be read: {error.strerror or error}") from error


def _is_left_over(path: Path) -> bool:
    if UNFINISHED.fullmatch(path.name):
        return temporary.is_left_over(path)
    return bool(UNFINISHED_BEFORE.fullmatch(path.name)) and time.time() - path.lstat().st_mtime > UNTOUCHED_S
