"""Digests of large files, remembered by what the file system says of them, so that an unchanged one is read once."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdtrain.errors import UserError
from sdtrain.files.writer import write_text

VERSION = 1
SETTLED_S = 2.0
"""A file that changed so recently may change again without another time: its digest is not remembered."""


class RememberedDigests:
    """Digests by path. One is believed as long as size, times (ns) and inode of the file are those of then.

    contradicted: the files that were read in spite of that and found to hold something else.
    """

    def __init__(self, path: Path) -> None:
        """Read what is remembered at `path`; a damaged or foreign file there is no reason not to begin anew."""
        self._path, self._changed = path, False
        self.contradicted: list[Path] = []
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            stored = json.loads(path.read_bytes())
            if isinstance(stored, dict) and stored.get("version") == VERSION and isinstance(stored.get("files"), dict):
                self._known = stored["files"]

    def of(self, file: Path, kind: str, compute: Callable[[Path], str], *, verify: bool = False) -> str:
        """Return the digest of a file, computed only where it is not known. Raises OSError as `compute` does.

        kind: tells digests of several sorts apart. verify: whether it is computed in any case. It may be called from
        several threads.
        """
        key, before = f"{kind} {file.resolve()}", _facts(file)
        known = self._known.get(key)
        is_known = isinstance(known, list) and known[:-1] == before and isinstance(known[-1], str)
        if known and is_known and not verify:
            return str(known[-1])
        digest = compute(file)
        if known and is_known and known[-1] != digest:
            self.contradicted.append(file)
        if _facts(file) == before and time.time() - max(before[1], before[2]) / 1e9 > SETTLED_S:
            self._known[key], self._changed = [*before, digest], True
        return digest

    def keep(self) -> None:
        """Write what was learnt. Where it cannot be written nothing is lost but time."""
        if self._changed:
            with contextlib.suppress(UserError):
                write_text(self._path, json.dumps({"version": VERSION, "files": self._known}))


def _facts(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
