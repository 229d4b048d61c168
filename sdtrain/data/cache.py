"""Encoded pictures and captions on disk, one small safetensors file each.

A file is named by a hash of everything that its content follows from, so that it is never stale: an edited picture is
looked up under another name. Files appear whole or not at all, so that several runs may share the folder.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdtrain.data.buckets import Placement
from sdtrain.data.masks.area import AREA_VERSION
from sdtrain.data.pixels import PIXELS_VERSION
from sdtrain.errors import UserError, user_error
from sdtrain.files.header import read_header
from sdtrain.files.tensors import planned, read_tensors, write_safetensors
from sdtrain.files.writer import reason

FORMAT_VERSION = 1
HELD_BYTES = 1 << 30  # up to this much is held in memory; more is read at every use
_CHECKSUM = "checksum"


class DamagedError(Exception):
    """The file of an entry is missing or is not what was written."""


def latents_path(cache: Path, file_digest: bytes, placement: Placement, vae_fingerprint: str) -> Path:
    """Return the path of the latents of a picture file in this placement by this VAE."""
    return _path(cache, "latents", file_digest, _geometry(placement), vae_fingerprint, str(PIXELS_VERSION))


def mask_path(cache: Path, file_digest: bytes, placement: Placement, *, is_alpha: bool) -> Path:
    """Return the path of a mask in the placement of its picture; it is a file of its own, or a picture's alpha."""
    kind = "alpha" if is_alpha else "file"
    return _path(cache, "masks", file_digest, _geometry(placement), kind, str(AREA_VERSION))


def caption_path(cache: Path, caption: str, text_fingerprint: str) -> Path:
    """Return the path of the encoding of a caption by these text encoders."""
    return _path(cache, "captions", caption, text_fingerprint)


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an entry, whole or not at all. Raises UserError if there is no room or no permission."""
    try:
        write_safetensors(path, planned(tensors), {_CHECKSUM: _checksum(tensors)})
    except UserError as error:
        what = f"cannot write to the cache: {reason(error)}; free some space or set data.cache to another folder"
        raise user_error(str(path.parents[2]), "data.cache", what) from error


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an entry as they were written. Raises DamagedError, also if there is no file."""
    try:
        header = read_header(path)
        tensors = read_tensors(header)
    except UserError as error:
        raise DamagedError(str(error)) from error
    if header.metadata.get(_CHECKSUM) != _checksum(tensors):
        raise DamagedError(f"{path}: the content does not match its checksum")
    return tensors


def is_whole(path: Path, *, thorough: bool) -> bool:
    """Return whether an entry is there and undamaged.

    thorough: whether its checksum is compared, which reads it all, or only its header and length.
    """
    try:
        if thorough:
            read(path)
        else:
            read_header(path)
    except (UserError, DamagedError):
        return False
    return True


def num_bytes(paths: Iterable[Path]) -> int:
    """Return the size in bytes of those of the files that exist."""
    return sum(path.stat().st_size for path in set(paths) if path.exists())


@dataclass(frozen=True)
class Entries:
    """Cache entries ready for use, in memory if they were few enough, else on disk. The results are the same."""

    held: Mapping[Path, dict[str, Tensor]]

    def get(self, path: Path) -> dict[str, Tensor]:
        """Return the tensors of an entry. Raises UserError if its file was damaged or removed during the run."""
        return self.held[path] if path in self.held else _read_for_use(path)


def hold(paths: Iterable[Path], budget_bytes: int) -> Entries:
    """Read the entries into memory if all of them together fit into the budget. Raises UserError as Entries.get."""
    distinct = set(paths)
    return Entries({path: _read_for_use(path) for path in distinct} if num_bytes(distinct) <= budget_bytes else {})


def _read_for_use(path: Path) -> dict[str, Tensor]:
    try:
        return read(path)
    except DamagedError as error:
        path.unlink(missing_ok=True)
        what = "was damaged or removed during the run; go on with --resume, and it is encoded anew"
        raise user_error("cache", str(path), what) from error


def _geometry(placement: Placement) -> str:
    sizes = (placement.original, placement.bucket, placement.scaled, placement.crop_left, placement.crop_top)
    return repr((*sizes, "flipped") if placement.flipped else sizes)


def _path(cache: Path, kind: str, *fields: str | bytes) -> Path:
    digest = hashlib.blake2b(digest_size=20)
    for field in (str(FORMAT_VERSION), kind, *fields):
        content = field if isinstance(field, bytes) else field.encode()
        digest.update(len(content).to_bytes(8, "little") + content)  # lengths keep "ab", "c" apart from "a", "bc"
    name = digest.hexdigest()
    return cache / kind / name[:2] / f"{name}.safetensors"  # no folder with a hundred thousand files


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a CRC over names, dtypes, shapes and bytes: against damage, not malice, so that reading stays quick."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
