"""Hashes of files: those by which other tools know a file, and a fast one by which we know our own.

The first are taken of a file's tensors while they are written. The fast one is XXH3 with 128 bits: it finds damage, not
malice, at the speed of memory (15 GB/s where BLAKE2b does 0.5), so that it costs next to nothing to look.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import xxhash

LEGACY_WINDOW = (0x100000, 0x110000)
"""The range of bytes of a file that the first LoRA tools hashed."""
CHUNK_BYTES = 4 * 2**20
"""As much of a file is read at once: more does not make it faster."""


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


class Digest:
    """The fast hash of bytes that come one after the other."""

    def __init__(self) -> None:
        self._hash, self.num_bytes = xxhash.xxh3_128(), 0

    def update(self, chunk: bytes | memoryview) -> None:
        """Hash the next bytes."""
        self._hash.update(chunk)
        self.num_bytes += len(chunk)

    def text(self) -> str:
        """Return the hash of all bytes so far, as 32 hexadecimal digits."""
        return self._hash.hexdigest()


def digest_of(content: bytes) -> str:
    """Return the fast hash of bytes, as 32 hexadecimal digits."""
    return xxhash.xxh3_128(content).hexdigest()


def file_digest(path: Path, start: int = 0) -> str:
    """Return the fast hash of a file from byte `start` on. Raises OSError when it cannot be read."""
    digest, buffer = Digest(), bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.text()
