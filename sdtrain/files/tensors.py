"""Reads and writes tensors of safetensors files, one at a time: never a second copy of a model in memory.

The reader and the writer are our own (the format is a length, a JSON header and the tensors): a file can be gigabytes,
so it is hashed while it is written, its size is known before the first byte, and the same tensors give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from sdtrain.errors import user_error
from sdtrain.files.hashes import NO_HASHES, Digest, Hasher, Hashes
from sdtrain.files.header import BITS, Entry, Header, header_bytes
from sdtrain.files.writer import atomic_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**22
"""How many values are looked at together."""
Seal = Callable[[Hashes], Mapping[str, str]]
"""Maps the hashes of the tensors to metadata, which must be as long for one file's hashes as for another's."""


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its type and shape now, its values only when it is its turn."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in the file, in bytes."""
        return math.prod(self.shape) * BITS[NAMES[self.dtype]] // 8


def planned(tensors: Mapping[str, Tensor]) -> dict[str, Planned]:
    """Return tensors that are in memory already as ones that will be written as they are."""
    return {name: _as_it_is(tensor) for name, tensor in tensors.items()}


def _as_it_is(tensor: Tensor) -> Planned:
    return Planned(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def in_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Return the names of tensors of these types in the order in which they are written.

    The widest types come first, as the format advises, so that every tensor is aligned to its type.
    """
    return sorted(dtypes, key=lambda name: (-BITS[NAMES[dtypes[name]]], name))


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Planned],
    metadata: Mapping[str, str],
    *,
    seal: Seal | None = None,
    finite_only: bool = False,
    digest: Digest | None = None,
) -> Hashes:
    """Write a file whole or not at all. Returns the hashes of its tensors; without a seal nothing is hashed.

    seal: gives the metadata that is added once the tensors, and with them their hashes, are known. finite_only:
    whether a value that is not finite in its type is refused. digest: is fed every byte of the file; not together
    with a seal, which writes the header twice. Raises UserError as `finite_only` says, and as `atomic_file` does.
    """
    assert seal is None or digest is None, "a sealed file has its header written twice"
    order = in_order({name: tensor.dtype for name, tensor in tensors.items()})
    shapes = {name: (NAMES[tensors[name].dtype], tensors[name].shape) for name in order}
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    hasher = Hasher(len(header_bytes(shapes, training)))

    def header(hashes: Hashes) -> bytes:
        return header_bytes(shapes, {**metadata, **(seal(hashes) if seal else {})})

    start = header(NO_HASHES)
    with atomic_file(path, len(start) + sum(tensor.num_bytes for tensor in tensors.values())) as file:
        file.write(start)
        if digest:
            digest.update(start)
        for name in order:
            data = _bytes_of(path, name, tensors[name], finite_only=finite_only)
            file.write(data)
            if seal:
                hasher.update(data)
            if digest:
                digest.update(data)
        if seal is None:
            return NO_HASHES
        final = header(hasher.hashes())
        assert len(final) == len(start), "a seal must be as long for one file's hashes as for another's"
        file.seek(0)
        file.write(final)
    return hasher.hashes()


def _bytes_of(path: Path, name: str, plan: Planned, *, finite_only: bool) -> memoryview:
    values = plan.values()
    tensor = values.detach().to("cpu", plan.dtype).contiguous()
    assert tuple(tensor.shape) == plan.shape, f"{name} has shape {tuple(tensor.shape)}, not {plan.shape}"
    if finite_only and tensor.is_floating_point() and not _is_finite(tensor):
        raise user_error(str(path), name, _not_finite(values, plan.dtype))
    return _memory(tensor)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; piece by piece, for torch needs three times a tensor's memory to see it."""
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.view(-1), PIECE))


def _not_finite(values: Tensor, dtype: torch.dtype) -> str:
    if torch.isfinite(values).all():
        return f"has values too large for {NAMES[dtype]}; export in bf16 or fp32"
    return "has values that are not finite: the model is broken and was not written"


def read_tensors(header: Header) -> dict[str, Tensor]:
    """Read all tensors of a file, on the CPU, as they are stored.

    Raises UserError when the file changed since its header was read.
    """
    return dict(each_tensor(header))


def each_tensor(header: Header) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a file one after the other, with their names. Raises UserError as `read_tensors` does."""
    try:
        with header.path.open("rb", buffering=0) as file:
            for name, entry in header.entries.items():
                yield name, read_tensor(file, entry)
    except OSError as error:
        raise user_error(str(header.path), header.path.name, f"cannot be read: {error.strerror}") from None


def read_tensor(file: FileIO, entry: Entry, third: int | None = None) -> Tensor:
    """Read one tensor as it is stored, or with `third` that third of its rows.

    Bytes are read straight into the tensor. A memory map would show the same pages a second time in the process's
    resident size and would crash the run if the file were overwritten meanwhile.
    """
    rows, start, num_bytes = entry.shape, entry.start, entry.end - entry.start
    if third is not None:
        num_bytes //= 3
        rows, start = (entry.shape[0] // 3, *entry.shape[1:]), start + third * num_bytes
    tensor = torch.empty(rows, dtype=DTYPES[entry.dtype])
    if num_bytes:
        _read_into(file, start, _memory(tensor))
    return tensor


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _read_into(file: FileIO, start: int, buffer: memoryview) -> None:
    file.seek(start)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise user_error(str(file.name), Path(str(file.name)).name, "became shorter while it was read")
        done += count
