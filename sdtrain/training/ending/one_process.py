"""One run, one process: who trains in a run's folder holds a lock, which the kernel takes back when the process dies.

The lock stands beside the folder, which may not be there yet: `runs/.NAME.lock`. No torch.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from sdtrain.errors import user_error
from sdtrain.files.writer import make_folder, write_text

PATIENCE_S = 1.0
"""How long a start waits for somebody who only looks who holds the lock, which takes a moment."""


@dataclass(frozen=True)
class Holder:
    """The process that trains in a folder."""

    process: int
    host: str
    since: str
    """When it began, as `2026-11-25 19:12:03 UTC`."""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises UserError when another process holds it, saying which."""
    lock = _lock_of(folder)
    try:
        make_folder(Path(lock.lock_file).parent)
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        raise user_error(str(folder), "name", _held(folder)) from None
    except OSError as error:
        what = f"cannot be locked in {lock.lock_file}: {error.strerror or error}; choose a folder you may write to"
        raise user_error(str(folder), "output", what) from None
    holder = _holder_path(folder)
    try:
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        write_text(holder, json.dumps(asdict(Holder(os.getpid(), platform.node(), now))))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def holder_of(folder: Path) -> str:
    """Return which process trains in a folder now, for a sentence; empty where none does."""
    lock = _lock_of(folder)
    if not Path(lock.lock_file).exists():
        return ""
    try:
        with lock:
            return ""
    except Timeout:
        return _holder_text(folder)
    except OSError:  # a disk that cannot be written, on which nobody trains
        return ""


def _lock_of(folder: Path) -> FileLock:
    """Return the lock beside a folder; it does not wait."""
    home = _home(folder)
    return FileLock(home.with_name(f".{home.name}.lock"), timeout=0)


def _holder_path(folder: Path) -> Path:
    """Return the file that says who holds the lock; it is believed only while somebody does."""
    home = _home(folder)
    return home.with_name(f".{home.name}.lock.json")


def _home(folder: Path) -> Path:
    return Path(os.path.realpath(folder))  # by whatever links it is reached


def _holder_text(folder: Path) -> str:
    return str(_read_holder(folder) or "another process")


def _read_holder(folder: Path) -> Holder | None:
    try:
        return Holder(**json.loads(_holder_path(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # it begins or ends in this very moment
        return None


def _held(folder: Path) -> str:
    return (
        f"{folder} is being trained by {_holder_text(folder)}; wait for it, stop it (Ctrl-C there, or `kill` its "
        "number, saves its state), or choose another `name` (--set name=...)"
    )
