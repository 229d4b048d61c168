"""Names of files that are not finished, and what becomes of those that a killed process left.

A file is written under such a name in the folder it belongs to and renamed when it is whole. The name begins with a dot
and says who writes: `.model.safetensors.1f3a9c02-4711-8d5e01aa.partial` is process 4711 of the machine 1f3a9c02, and
the last part tells its own files apart. So the next writer in the folder can see that nobody will finish the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Literal

End = Literal["partial", "old"]
"""`partial` is unfinished and worth nothing; `old` is a whole folder, moved aside until the new one has its name."""

NAME = re.compile(r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.(?P<end>partial|old)")
SHOWN_LETTERS = 48
"""How many letters of a name a `partial` one keeps: file systems allow 255 bytes, and the rest needs some of them."""
UNTOUCHED_ELSEWHERE_S = 3600.0
UNTOUCHED_HERE_S = 24 * 3600.0
"""After this time without a change a file is left over, even where its process runs: process numbers are reused."""


def temporary_name(path: Path, end: End) -> Path:
    """Return a fresh name beside `path`; no two calls give the same, in whatever thread, process or machine."""
    shown = path.name[:SHOWN_LETTERS] if end == "partial" else path.name
    return path.with_name(f".{shown}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.{end}")


@cache
def _machine() -> str:
    """Return eight digits for this machine and, in a container, for its own numbering of processes."""
    try:
        processes = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # not Linux
        processes = 0
    return hashlib.blake2b(f"{platform.node()} {processes}".encode(), digest_size=4).hexdigest()


def is_left_over(path: Path) -> bool:
    """Return whether nobody will finish what lies under a temporary name.

    That is so when the process that its name gives has ended. Of processes on another machine nothing is known
    here, so theirs are left over after an hour without a change; those of a living process of this machine after a
    day.
    """
    found = NAME.fullmatch(path.name)
    if found is None:
        return False
    here = found["machine"] == _machine()
    if here and not _is_running(int(found["process"])):
        return True
    return _untouched_s(path) > (UNTOUCHED_HERE_S if here else UNTOUCHED_ELSEWHERE_S)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # asking with os.kill would end it
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _untouched_s(path: Path) -> float:
    """Return the seconds since anything in a file or folder changed; 0 when it is gone meanwhile."""
    try:
        newest = max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))
    except OSError:
        return 0.0
    return time.time() - newest


def remove_left_overs(folder: Path) -> None:
    """Remove what killed processes left in a folder, so that it does not fill the disk.

    A folder that was moved aside for one that never came gets its name back. What cannot be removed stays: that is no
    reason not to write.
    """
    for path in [entry for entry in folder.iterdir() if is_left_over(entry)]:
        found = NAME.fullmatch(path.name)
        assert found is not None
        home = path.with_name(found["name"])
        with contextlib.suppress(OSError):
            if found["end"] == "old" and not home.exists():
                path.rename(home)
            else:
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a whole folder; it is no error when it is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
