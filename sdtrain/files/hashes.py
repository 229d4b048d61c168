"""The hashes by which other tools know a file, taken of its tensors while they are written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

LEGACY_WINDOW = (0x100000, 0x110000)
"""The range of bytes of a file that the first LoRA tools hashed."""


@dataclass(frozen=True)
class Hashes:
    """The hashes of a file's tensors."""

    data: str
    """The SHA-256 of all bytes after the header, which is what readers compare `sshs_model_hash` with."""
    legacy: str
    """The first 8 digits of the SHA-256 of LEGACY_WINDOW, in the file as it would be with `ss_` metadata alone."""


NO_HASHES = Hashes("0" * 64, "0" * 8)
"""Stands in a header until the tensors are written; it is as long as real hashes, so that nothing moves."""


class Hasher:
    """Hashes the bytes of a file's tensors as they are written."""

    def __init__(self, legacy_start: int) -> None:
        """Begin before the first tensor.

        legacy_start: where the tensors begin, in bytes, in the file as it would be with `ss_` metadata alone.
        """
        self._position = legacy_start
        self._data, self._legacy = hashlib.sha256(), hashlib.sha256()

    def update(self, chunk: memoryview) -> None:
        """Hash the next bytes, in the order of the file."""
        self._data.update(chunk)
        first, last = (max(0, min(len(chunk), edge - self._position)) for edge in LEGACY_WINDOW)
        self._legacy.update(chunk[first:last])
        self._position += len(chunk)

    def hashes(self) -> Hashes:
        """Return the hashes of all bytes so far."""
        return Hashes(self._data.hexdigest(), self._legacy.hexdigest()[:8])
