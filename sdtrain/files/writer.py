"""Safetensors files written tensor by tensor: whole or not at all, never a second copy of the model in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdtrain.errors import user_error
from sdtrain.files.header import BITS

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
HASH_KEY = "modelspec.hash_sha256"
NO_HASH = "0x" + "0" * 64
SPARE_BYTES = 64 * 2**20
"""Disk space that is left to others."""


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its type and shape now, its values when it is its turn."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * BITS[NAMES[self.dtype]] // 8


def write_safetensors(path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> str:
    """Write a file; returns the sha256 of its tensor data as `0x...`, which also stands in it as modelspec's hash.

    Raises UserError when a value is not finite in its type; the file is then as it was before.
    """
    # The widest types first, as the format advises, so that every tensor is aligned to its type.
    order = sorted(tensors, key=lambda name: (-BITS[NAMES[tensors[name].dtype]], name))
    with atomic_file(path) as partial, partial.open("wb") as file:
        header = header_bytes(tensors, order, {**metadata, HASH_KEY: NO_HASH})
        file.write(header)
        digest = hashlib.sha256()
        for name in order:
            data = _bytes_of(path, name, tensors[name])
            digest.update(data)
            file.write(data)
        final = "0x" + digest.hexdigest()
        file.seek(0)
        file.write(header_bytes(tensors, order, {**metadata, HASH_KEY: final}))
        file.flush()
        os.fsync(file.fileno())
    return final


def header_bytes(tensors: Mapping[str, Planned], order: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a safetensors file, padded with blanks to a multiple of eight bytes."""
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.num_bytes
        content[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(path: Path, name: str, planned: Planned) -> memoryview:
    values = planned.values()
    tensor = values.detach().to("cpu", planned.dtype).contiguous()
    assert tuple(tensor.shape) == planned.shape, f"{name} has shape {tuple(tensor.shape)}, not {planned.shape}"
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise user_error(str(path), name, _not_finite(values, planned.dtype))
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _not_finite(values: Tensor, dtype: torch.dtype) -> str:
    if torch.isfinite(values).all():
        return f"has values too large for {NAMES[dtype]}; export in bf16 or fp32"
    return "has values that are not finite: the model is broken and was not written"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is gone when it does not.

    The temporary name is always the same, so that what a killed process left is overwritten by the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and is gone when it does not.

    A folder that is there already is moved aside, not deleted, before the new one has its name: a kill between the two
    renames leaves it whole as `.NAME.old`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    partial.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(path: Path, num_bytes: int) -> None:
    """Raise UserError when `num_bytes` do not fit onto the disk that `path` will be on."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free - SPARE_BYTES
    if num_bytes > free:
        raise user_error(
            str(path),
            "disk space",
            f"{num_bytes / 2**30:.2f} GiB are needed and {max(0, free) / 2**30:.2f} GiB free; make room or choose "
            "another folder",
        )
