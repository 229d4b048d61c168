"""The header of a safetensors file: names, types, shapes and places of its tensors, read without torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.errors import Problem, UserError, user_error

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
SETTINGS = ("model.path", "model.vae", "model.components")
BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 8),
}


@dataclass(frozen=True)
class Entry:
    """One tensor: its type as the format spells it, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The checked header of a whole safetensors file.

    Raises UserError for a pickle, a truncated file, or anything else whose bytes are not what its header promises.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise user_error(
            str(path),
            path.name,
            "is a pickle, which can run any code when it is read; get or convert it to .safetensors",
        )
    try:
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
        content = json.loads(text)
        metadata = content.pop("__metadata__", None) or {}
        entries = {name: _entry(value, data_start) for name, value in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise user_error(str(path), path.name, f"has a damaged safetensors header ({error}); fetch it again") from None
    problem = _size_problem(entries, data_start, file_bytes)
    if problem:
        raise user_error(str(path), path.name, problem)
    return Header(path, entries, {str(key): str(value) for key, value in metadata.items()})


def _entry(value: dict[str, Any], data_start: int) -> Entry:
    start, end = value["data_offsets"]
    return Entry(value["dtype"], tuple(int(size) for size in value["shape"]), data_start + start, data_start + end)


def _size_problem(entries: dict[str, Entry], data_start: int, file_bytes: int) -> str:
    """What is wrong between the header and the bytes behind it; empty when nothing is."""
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


def explain(error: UserError) -> str:
    """A UserError about a file in one sentence, to stand at the setting that names the file."""
    return "; ".join(_sentence(error.source, problem) for problem in error.problems)


def _sentence(source: str, problem: Problem) -> str:
    if problem.where == Path(source).name:
        return f"{source} {problem.what}"
    if problem.where in SETTINGS:
        return f"{source}: {problem.what}"
    return f"{source}: {problem.where} {problem.what}"
