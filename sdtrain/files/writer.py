"""Everything the program writes is written here, under one contract.

- Whole or not at all: a crash, a kill or a full disk at any moment leaves what was there before, or the new content.
- It is on the disk when the call returns, in a power cut too: the file before it gets its name, its folder after that,
  and a folder that was made for it by its name as well.
- Room is looked for before the first byte, where the size is known.
- What the operating system refuses is told as a sentence: a UserError that says what to do.
- Only a regular file replaces a file and only a folder replaces a folder; a link stays, and what it points to is
  written.
- What a killed process left under a temporary name is removed by the next writer in that folder (`temporary`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sdtrain.errors import UserError, user_error
from sdtrain.files.temporary import remove, remove_left_overs, temporary_name

SPARE_BYTES = 64 * 2**20
"""The most disk space that is left to others; it is no more than a hundredth of what is written either."""


@contextmanager
def atomic_file(path: Path, num_bytes: int = 0) -> Iterator[BinaryIO]:
    """Open a file whose content becomes that of `path` once the block has ended well; else nothing has changed.

    num_bytes: how much will be written, as far as it is known. Raises UserError when there is no room for it, when
    no file can stand at `path`, and when the file cannot be written.
    """
    with _told(path):
        target = _prepared(path, stat.S_ISREG, num_bytes)
        partial = temporary_name(target, "partial")
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    _sync_names(target.parent)


@contextmanager
def atomic_folder(path: Path, num_bytes: int = 0) -> Iterator[Path]:
    """Make a new folder that becomes `path` once the block has ended well; else nothing has changed.

    A folder that is there already is moved aside, not deleted, before the new one has its name: after a kill
    between the two renames the next writer gives it its name back. Raises UserError as `atomic_file` does.
    """
    with _told(path):
        target = _prepared(path, stat.S_ISDIR, num_bytes)
        partial = temporary_name(target, "partial")
        try:
            partial.mkdir()
            yield partial
            for inner in (*partial.rglob("*"), partial):
                sync(inner)
            old = _rename_over(partial, target)
        finally:
            remove(partial)
    _sync_names(target.parent)
    if old is not None:
        remove_folder(old)


def _rename_over(partial: Path, target: Path) -> Path | None:
    """Rename a finished folder over another; return where the other is now, None if there was none.

    No file system does this in one step.
    """
    if not target.exists():
        partial.rename(target)
        return None
    old = temporary_name(target, "old")
    try:
        target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    return old


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is gone in one step; what a kill leaves of it is removed by the next writer."""
    doomed = temporary_name(path, "partial")
    path.rename(doomed)
    remove(doomed)


def rename_folder(path: Path, name: str) -> None:
    """Give a folder another name beside it; a folder that has the name goes. Raises UserError as `atomic_file` does."""
    target = path.with_name(name)
    with _told(path):
        remove(target)
        path.rename(target)
    _sync_names(target.parent)


def _prepared(path: Path, is_right: Callable[[int], bool], num_bytes: int) -> Path:
    """Return the path that is written: `path`, or what a link points to. Its folder is made, without left-over files.

    is_right: whether what is there already, told by its mode, may be replaced. Raises UserError when it may not,
    and when there is no room for `num_bytes`.
    """
    _require_right(path, is_right)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.parent.is_dir():
        remove_left_overs(target.parent)
    check_space(target, num_bytes)
    make_folder(target.parent)
    return target


def require_place(path: Path, *, folder: bool = False) -> None:
    """Refuse a path where no file, or no folder, can be written, before work is done for it. Nothing is made.

    Raises UserError.
    """
    with _told(path):
        _require_right(path, stat.S_ISDIR if folder else stat.S_ISREG)
        above = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists() and one != path)
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _require_right(path: Path, is_right: Callable[[int], bool]) -> None:
    """Refuse to replace what is there, where its mode is not that of what will be written."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not is_right(mode):
        raise user_error(str(path), path.name, _wrong_place(mode))


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless they are there; their names are on the disk when the call returns.

    Without that a power cut could take a folder away with all that was saved in it. Raises OSError, and UserError where
    the disk does not confirm it.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_names(path.parent)


def _wrong_place(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "is a folder, which no file can replace; name a file in it"
    if stat.S_ISREG(mode):
        return "is a file, which no folder can replace; move it away or choose another name"
    return "is a device or a pipe, which is never replaced; name a file"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a UserError about `path`, whose cause is the OSError."""
    try:
        yield
    except OSError as error:
        what = f"could not be written: {error.strerror or error}; nothing was changed; {_advice(error)}"
        raise user_error(str(path), path.name, what) from error


def _advice(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "make room or choose another folder, and try again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "choose a folder you may write to"
        case errno.ENAMETOOLONG:
            return "choose a shorter name"
        case errno.ENOTDIR | errno.EEXIST:
            return "a file is in the place of one of its folders: move it away or choose another folder"
        case _:
            return "look at the disk, or choose another folder"


def check_space(path: Path, num_bytes: int) -> None:
    """Raise UserError when `num_bytes` do not fit onto the disk that `path` will be on."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if num_bytes + min(SPARE_BYTES, num_bytes // 100) > free:
        what = f"{_size(num_bytes)} are needed and {_size(free)} free; make room or choose another folder"
        raise user_error(str(path), "disk space", what) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes:,} bytes"


def _sync_names(folder: Path) -> None:
    try:
        sync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such call for folders
            what = f"was written, but the disk does not confirm it: {error.strerror}; look at the disk"
            raise user_error(str(folder), folder.name, what) from error


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, outlive a power cut."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened, and a rename needs no help
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises UserError as `atomic_file` does."""
    with atomic_file(path, len(content)) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all. Raises UserError as `atomic_file` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file in the form that diffusers and transformers use, whole or not at all.

    Raises UserError as `atomic_file` does.
    """
    write_text(path, json.dumps(dict(content), indent=2, sort_keys=True) + "\n")


def reason(error: UserError) -> str:
    """Return what the operating system said when a file could not be written, for callers with advice of their own."""
    cause = error.__cause__
    return cause.strerror or str(cause) if isinstance(cause, OSError) else error.problems[0].what
