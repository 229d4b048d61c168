"""Reads the header of a safetensors file without torch: which tensors it holds and where their bytes lie."""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.errors import Problem, UserError, user_error

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
LARGEST = 2**56
"""The most numbers in a tensor, counted as if no side were 0; more could not be counted in bytes."""
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
SETTINGS = ("model.path", "model.vae", "model.components")
BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 8),
}
FRACTIONS = ("F64", "F32", "F16", "BF16")
"""The types that hold enough of a number to be trained."""
SCALARS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "BOOL": "?"} | {
    "U64": "Q",
    "U32": "I",
    "U16": "H",
    "U8": "B",
}
"""The types whose single numbers can be read, and how the module `struct` spells them."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type as the format spells it, its shape, and where its bytes lie in the file.

    start and end: byte positions counted from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds: its tensors by name, and its metadata."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a whole safetensors file.

    Raises UserError for a pickle, a truncated file, or anything else whose bytes are not what its header promises.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise user_error(
            str(path),
            path.name,
            "is a pickle, which can run any code when it is read; get or convert it to .safetensors",
        )
    try:
        _require_file(path)
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            start = file.read(LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            if len(start) < LENGTH_BYTES or length > min(file_bytes - LENGTH_BYTES, MAX_HEADER_BYTES):
                raise user_error(str(path), path.name, _not_safetensors(start, file_bytes))
            text = file.read(length)
    except FileNotFoundError:
        raise user_error(str(path), path.name, "no such file") from None
    except OSError as error:
        raise user_error(str(path), path.name, f"cannot be read: {error.strerror}") from None
    return _parse(path, text, LENGTH_BYTES + length, file_bytes)


def _require_file(path: Path) -> None:
    """Refuse what is no regular file: opening a pipe would wait for ever, and a device has no size."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise user_error(str(path), path.name, "is a folder, not a safetensors file; name the file in it")
    if not stat.S_ISREG(mode):
        raise user_error(str(path), path.name, "is a device or a pipe, not a safetensors file; name a file")


def _not_safetensors(start: bytes, file_bytes: int) -> str:
    if file_bytes == 0:
        return "is empty; fetch it again"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "is a pickle under another name, which can run any code when it is read; get it as .safetensors"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not a model; fetch the file itself"
    if start[:7] == b"version":
        return "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
    return f"is not a safetensors file, or cut off in its header ({file_bytes} bytes); fetch it again"


def _parse(path: Path, text: bytes, data_start: int, file_bytes: int) -> Header:
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
        if not isinstance(content, dict):
            raise TypeError("it is no JSON table")
        stored = content.pop("__metadata__", None) or {}
        entries = {_printable(name): _entry(name, value, data_start) for name, value in content.items()}
        metadata = {_printable(str(key)): _printable(str(value)) for key, value in stored.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise user_error(str(path), path.name, f"has a damaged safetensors header ({error}); fetch it again") from None
    problem = _size_problem(entries, data_start, file_bytes)
    if problem:
        raise user_error(str(path), path.name, problem)
    return Header(path, entries, metadata)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON table. Raises ValueError for equal names, as readers do not agree which of two counts."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"`{double}` stands in it twice")
    return table


def _printable(text: str) -> str:
    """Return the text itself. Raises ValueError for halves of characters, which JSON can spell and no screen shows."""
    text.encode("utf-8")
    return text


def _entry(name: str, value: dict[str, Any], data_start: int) -> Entry:
    start, end = value["data_offsets"]
    shape, dtype = value["shape"], value["dtype"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError(f"`{name}` has no type or no shape")
    for number in (start, end, *shape):
        if type(number) is not int or number < 0:  # True is an int to isinstance
            raise ValueError(f"`{name}` has {number!r} where only a whole number from 0 on can stand")
    if math.prod(max(1, size) for size in shape) > LARGEST:
        raise ValueError(f"`{name}` has a shape that no tensor can have")
    return Entry(_printable(dtype), tuple(shape), data_start + start, data_start + end)


def _size_problem(entries: dict[str, Entry], data_start: int, file_bytes: int) -> str:
    """Return what is wrong between the header and the bytes behind it; empty when nothing is."""
    expected = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.dtype not in BITS:
            return f"holds `{name}` in the unknown type {entry.dtype}"
        size = math.prod(entry.shape) * BITS[entry.dtype] // 8
        if entry.start != expected or entry.end - entry.start != size:
            return f"has a damaged safetensors header: `{name}` does not lie where it should; fetch the file again"
        expected = entry.end
    if file_bytes < expected:
        return f"is cut off: {file_bytes} of {expected} bytes are there; fetch it again"
    if file_bytes > expected:
        return f"has {file_bytes - expected} bytes more than its header accounts for; fetch it again"
    return ""


def read_scalars(header: Header, suffix: str) -> dict[str, float]:
    """Return the values of the one-element tensors whose names end in `suffix`, by name.

    Tensors whose type is not in SCALARS or BF16 are left out. Raises UserError when the file changed since its
    header was read.
    """
    values = {}
    try:
        with header.path.open("rb") as file:
            for name, entry in header.entries.items():
                known = entry.dtype in SCALARS or entry.dtype == "BF16"
                if name.endswith(suffix) and math.prod(entry.shape) == 1 and known:
                    file.seek(entry.start)
                    values[name] = _number(entry.dtype, file.read(entry.end - entry.start))
    except (OSError, struct.error):
        raise user_error(str(header.path), header.path.name, "changed while it was read; try again") from None
    return values


def _number(dtype: str, raw: bytes) -> float:
    if dtype == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack("<" + SCALARS[dtype], raw)[0])


def header_bytes(shapes: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Return the length and the JSON header of a safetensors file, padded with blanks to a multiple of eight bytes.

    shapes: type and shape of every tensor, in the order in which their bytes will follow. Metadata is sorted, so
    that the same content gives the same bytes.
    """
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name, (dtype, shape) in shapes.items():
        end = start + math.prod(shape) * BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def explain(error: UserError) -> str:
    """Return a UserError about a file as one sentence, to stand at the setting that names the file."""
    return "; ".join(_sentence(error.source, problem) for problem in error.problems)


def _sentence(source: str, problem: Problem) -> str:
    if problem.where == Path(source).name:
        return f"{source} {problem.what}"
    if problem.where in SETTINGS:
        return f"{source}: {problem.what}"
    return f"{source}: {problem.where} {problem.what}"
