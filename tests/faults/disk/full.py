"""Disks that fill up: a small one of their own where that may be mounted, else one that says that it is full."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.faults.disk.calls import Call, Perform, calls_to_disk

SIZE_MIB = 24


class Tmpfs:
    """A file system in memory, with an end of its own: the kernel refuses what does not fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        size = f"size={SIZE_MIB}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True, capture_output=True)

    def fill(self) -> None:
        with (self.folder / "filler").open("wb", buffering=0) as file:
            for size in (2**20, 4096):
                while self._takes(file, bytes(size)):
                    pass

    def _takes(self, file: Any, content: bytes) -> bool:
        try:
            return bool(file.write(content) == len(content))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return False

    def make_room(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def perform(self, call: Call, perform: Perform) -> Any:
        return perform(call.data)

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.folder], check=True)


class SaidToBeFull:
    """A folder whose every write is refused while it is said to be full, as the kernel would; for any user."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_full = folder, False
        folder.mkdir(exist_ok=True)
        usage = shutil.disk_usage

        def said(path: Path) -> Any:
            found = usage(path)
            return found._replace(free=0) if self.is_full else found

        self._patch = mock.patch.object(shutil, "disk_usage", said)
        self._patch.start()

    def fill(self) -> None:
        self.is_full = True

    def make_room(self) -> None:
        self.is_full = False

    def perform(self, call: Call, perform: Perform) -> Any:
        if self.is_full and call.what in ("write", "make folder"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), call.path)
        return perform(call.data)

    def close(self) -> None:
        self._patch.stop()


Disk = Tmpfs | SaidToBeFull


def disk_in(folder: Path, *, real: bool) -> Disk:
    """Return a disk that can be filled. real: whether it is one of its own, if this user may mount one."""
    try:
        return Tmpfs(folder) if real else SaidToBeFull(folder)
    except (OSError, subprocess.CalledProcessError):  # no `mount`, or no right to it
        return SaidToBeFull(folder)


@contextmanager
def filled_at(disk: Disk, is_it: Callable[[Call], bool]) -> Iterator[list[Call]]:
    """Fill a disk at the first call that is meant, just before it is made; give the list of these calls, of one."""
    met: list[Call] = []

    def around(call: Call, perform: Perform) -> Any:
        if not met and is_it(call):
            met.append(call)
            disk.fill()
        return disk.perform(call, perform)

    with calls_to_disk(disk.folder, around):
        yield met
