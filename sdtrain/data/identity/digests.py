"""Digests of picture files: what the cache knows a picture by, and what a run knows it by. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sdtrain.data.masks.mask import Mask
from sdtrain.data.threads import map_ahead
from sdtrain.errors import user_error
from sdtrain.files.progress import Progress, unseen
from sdtrain.files.remembered import RememberedDigests


def picture_digests(
    paths: Sequence[Path],
    remembered: RememberedDigests | None = None,
    on_progress: Progress = unseen,
    *,
    verify: bool = False,
) -> list[bytes]:
    """Return a digest of the bytes of each file. Raises UserError for one that cannot be read.

    remembered: digests of files that have not changed since; None reads all. verify: whether all are read in any case,
    and what is remembered is only compared.
    """

    def digest(path: Path) -> bytes:
        try:
            if remembered is None:
                return bytes.fromhex(_digest(path))
            return bytes.fromhex(remembered.of(path, "picture", _digest, verify=verify))
        except OSError as error:
            raise user_error("data", str(path), f"picture cannot be read: {error.strerror or error}") from error

    digests: list[bytes] = []
    for found in map_ahead(digest, paths):
        digests.append(found)
        on_progress("reading pictures", len(digests), len(paths))
    return digests


def mask_digests(masks: Sequence[Mask], remembered: RememberedDigests | None = None) -> dict[Path, bytes]:
    """Return a digest of each file that is a mask and nothing else. Raises UserError for one that cannot be read."""
    paths = sorted({mask.path for mask in masks if not mask.is_alpha})
    return dict(zip(paths, picture_digests(paths, remembered), strict=True))


def content_digest(content: bytes) -> bytes:
    """Return the digest of a file that holds these bytes."""
    return hashlib.blake2b(content).digest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
