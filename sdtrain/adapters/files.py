"""Safetensors files, written whole or not at all, and their headers, read without torch.

The writer is our own (the format is a length, a JSON header and the tensors) because a file can be hundreds of
megabytes: it is hashed and written tensor by tensor, its size is known before the first byte, and the same weights
give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.errors import user_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
LONGEST_HEADER = 100_000_000  # the limit of the reference reader
LEGACY_WINDOW = (0x100000, 0x110000)  # the bytes that the first LoRA tools hashed


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies; `start` and `end` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its tensors."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises UserError when the file is missing, no safetensors, or cut off."""
    if path.suffix in PICKLES:
        raise user_error(str(path), path.suffix, "is a pickle, which can run code; convert it to .safetensors first")
    if not path.is_file():
        raise user_error(str(path), "file", "no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= LONGEST_HEADER:
            raise user_error(str(path), "header", "is not a safetensors file (no header at its start)")
        if 8 + length > size:
            raise user_error(str(path), "header", _cut_off(8 + length, size))
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        tensors = {name: _entry(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise user_error(str(path), "header", "is not a safetensors file (its header is no JSON table)") from None
    _check_places(path, tensors, 8 + length, size)
    return Header(tensors, metadata, 8 + length)


def _entry(entry: dict[str, Any]) -> TensorEntry:
    start, end = entry["data_offsets"]
    return TensorEntry(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), int(start), int(end))


def _check_places(path: Path, tensors: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    for name, entry in tensors.items():
        if not 0 <= entry.start <= entry.end or min(entry.shape, default=0) < 0:
            raise user_error(str(path), name, "lies at no possible place: the header is damaged, fetch it again")
        if data_start + entry.end > size:
            raise user_error(str(path), name, _cut_off(data_start + entry.end, size))
        elements = 1
        for length in entry.shape:
            elements *= length
        wanted = elements * ITEM_SIZES.get(entry.dtype, 0)
        if wanted and entry.end - entry.start != wanted:
            raise user_error(
                str(path),
                name,
                f"holds {entry.end - entry.start} bytes, its shape needs {wanted}: fetch the file again",
            )


def _cut_off(wanted: int, size: int) -> str:
    return f"ends at byte {wanted:,}, but the file has only {size:,}: it was cut off, fetch or copy it again"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, as stored. Raises UserError as `read_header` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise user_error(
            str(path), "file", f"cannot be read as safetensors ({error}); fetch or copy it again"
        ) from None


def read_scalars(path: Path, header: Header, suffix: str) -> dict[str, float]:
    """Values of the one-element tensors whose names end in `suffix`, without torch."""
    values = {}
    with path.open("rb") as file:
        for name, entry in header.tensors.items():
            if name.endswith(suffix) and entry.end - entry.start == ITEM_SIZES.get(entry.dtype):
                file.seek(header.data_start + entry.start)
                values[name] = _number(entry.dtype, file.read(entry.end - entry.start))
    return values


def _number(dtype: str, raw: bytes) -> float:
    if dtype == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    codes = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}
    return float(struct.unpack("<" + codes[dtype], raw)[0])


@dataclass(frozen=True)
class Hashes:
    """What the tensors of a file hash to."""

    data: str
    """SHA-256 of all bytes after the header, which is what readers compare `sshs_model_hash` with."""
    legacy: str
    """First 8 digits of the SHA-256 of bytes 0x100000 to 0x110000 of the file as it is with `ss_` metadata alone."""


def hash_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Hashes:
    """Hashes of the file that these tensors make; of `metadata` only the `ss_` keys count."""
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    position = len(_header(tensors, training))
    data, legacy = hashlib.sha256(), hashlib.sha256()
    for chunk in _chunks(tensors):
        data.update(chunk)
        first, last = (max(0, min(len(chunk), edge - position)) for edge in LEGACY_WINDOW)
        legacy.update(chunk[first:last])
        position += len(chunk)
    return Hashes(data.hexdigest(), legacy.hexdigest()[:8])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it once it is on the disk.

    Raises UserError when the disk has no room, before the first byte or when it fills up while writing; a file that
    was there before stays as it was.
    """
    header = _header(tensors, metadata)
    size = len(header) + sum(_num_bytes(tensor) for tensor in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise user_error(str(path), "disk", f"{size:,} bytes are needed and {free:,} are free: make room and try again")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            for chunk in _chunks(tensors):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise user_error(str(path), "disk", f"could not be written: {error.strerror}; nothing was changed") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened, and a rename needs no help
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # or a crash could undo the rename
    finally:
        os.close(descriptor)


def _dtype_name(dtype: torch.dtype) -> str:
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return (names | {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"})[dtype]


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide types first, as the reference writer does, so that every tensor starts at a multiple of its item size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name in _ordered(tensors):
        tensor = tensors[name]
        offsets = [place, place + _num_bytes(tensor)]
        entries[name] = {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    import torch

    for name in _ordered(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
