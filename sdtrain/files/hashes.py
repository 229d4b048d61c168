"""What other tools know a file by: hashes of its tensors, taken while they are written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

LEGACY_WINDOW = (0x100000, 0x110000)
"""The bytes of a file that the first LoRA tools hashed."""


@dataclass(frozen=True)
class Hashes:
    """What the tensors of a file hash to."""

    data: str
    """SHA-256 of all bytes after the header, which is what readers compare `sshs_model_hash` with."""
    legacy: str
    """First 8 digits of the SHA-256 of bytes 0x100000 to 0x110000 of the file as it is with `ss_` metadata alone."""


NO_HASHES = Hashes("0" * 64, "0" * 8)
"""What stands in a header until the tensors are written; as long as real ones, so that nothing moves."""


class Hasher:
    """Takes the bytes of the tensors in the order of the file."""

    def __init__(self, legacy_start: int) -> None:
        """legacy_start: where the tensors begin in the file with `ss_` metadata alone, in bytes."""
        self._position = legacy_start
        self._data, self._legacy = hashlib.sha256(), hashlib.sha256()

    def update(self, chunk: memoryview) -> None:
        """The next bytes."""
        self._data.update(chunk)
        first, last = (max(0, min(len(chunk), edge - self._position)) for edge in LEGACY_WINDOW)
        self._legacy.update(chunk[first:last])
        self._position += len(chunk)

    def hashes(self) -> Hashes:
        """Of all bytes so far."""
        return Hashes(self._data.hexdigest(), self._legacy.hexdigest()[:8])
