"""Every call by which the program changes the disk, seen as it is made: to count it, to fail it, to kill, to record."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal
from unittest import mock

What = Literal["make", "write", "cut", "flush", "rename", "remove", "make folder", "remove folder", "nothing"]


@dataclass(frozen=True)
class Call:
    """One call to the operating system. Paths are absolute; `to` is the new name of a rename; `cut` shortens a file.

    No call that is made is `nothing`: it stands for one that was left out.
    """

    what: What
    path: str
    to: str = ""
    data: bytes = b""
    offset: int = 0


Perform = Callable[[bytes], Any]
"""Makes the call; what it is handed is written, by a write, and does not matter to any other call."""
Around = Callable[[Call, Perform], Any]
"""Stands around every call: it may make it, make a part of it, not make it, or raise."""


@contextmanager
def calls_to_disk(folder: Path, around: Around) -> Iterator[None]:
    """Put a function around every call that changes something under a folder.

    It sees what the program asks of the operating system, after its buffers: a write is one that reaches the kernel.
    """
    root = os.path.realpath(folder)

    def seen(what: What, path: Any, perform: Perform, **more: Any) -> Any:
        full = str(Path(path).absolute())
        inside = full == root or full.startswith(root + os.sep)
        return around(Call(what, full, **more), perform) if inside else perform(more.get("data", b""))

    class File(FileIO):
        def __init__(self, path: Any, mode: str) -> None:
            self.where = str(Path(path).absolute())
            begin = super().__init__
            if Path(path).exists() and "w" not in mode:  # it is added to, or it will say that it is there already
                begin(path, mode)
            else:
                seen("make", path, lambda _: begin(path, mode))

        def write(self, data: Any) -> int:
            offset = self.seek(0, 2) if "a" in self.mode else self.tell()
            write = super().write
            return int(seen("write", self.where, write, data=bytes(data), offset=offset))

        def truncate(self, size: int | None = None) -> int:
            assert size is not None
            cut = super().truncate
            return int(seen("cut", self.where, lambda _: cut(size), offset=size))

    open_file = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if not set(mode) & set("xwa+") or isinstance(file, int):
            return open_file(file, mode, *arguments, **more)
        assert "b" in mode, f"{file}: texts are written as bytes"
        return io.BufferedWriter(File(file, mode))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(io, "open", opened))
        stack.enter_context(mock.patch("sdtrain.training.watching.log.FileIO", File))
        for name, wrapped in _wrapped(seen).items():
            stack.enter_context(mock.patch.object(os, name, wrapped))
        yield


def _wrapped(seen: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return the functions of `os` that change names in folders, and the one that flushes, each of which is seen."""
    one_path: dict[str, What] = {
        "unlink": "remove",
        "remove": "remove",
        "rmdir": "remove folder",
        "mkdir": "make folder",
    }

    def of_one(name: str, what: What) -> Callable[..., Any]:
        original = getattr(os, name)

        def wrapped(path: Any, *arguments: Any, dir_fd: int | None = None, **more: Any) -> Any:
            full = Path(path) if dir_fd is None else Path(_path_of(dir_fd), path)
            return seen(what, full, lambda _: original(path, *arguments, dir_fd=dir_fd, **more))

        return wrapped

    def of_two(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def wrapped(path: Any, to: Any) -> Any:
            return seen("rename", path, lambda _: original(path, to), to=str(Path(to).absolute()))

        return wrapped

    fsync = os.fsync

    def flush(descriptor: int) -> None:
        seen("flush", _path_of(descriptor), lambda _: fsync(descriptor))

    functions = {name: of_one(name, what) for name, what in one_path.items()}
    return functions | {name: of_two(name) for name in ("rename", "replace")} | {"fsync": flush}


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())
