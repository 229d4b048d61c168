"""Captions that stand in one file for many pictures: Hugging Face's metadata files, and sd-scripts' meta_cap.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.data.captions.text import CaptionError, Lines, read_text, texts_of

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
META_CAP_NAME = "meta_cap.json"
_TEXT_KEYS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Row:
    """One entry of a table: where it stands in the file, the picture that it names, and its texts."""

    where: str
    name: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """What a file says, and what is wrong with it, each in one sentence."""

    rows: tuple[Row, ...]
    wrong: tuple[str, ...]


def read_metadata(path: Path, lines: Lines) -> Table:
    """Return the rows of a metadata.jsonl or metadata.csv, as Hugging Face's imagefolder has them.

    Each names a picture (`file_name`, below the file's own folder) and its text: one string, or a list of several.
    """
    try:
        content = read_text(path)
    except CaptionError as error:
        return Table((), (str(error),))
    records = _csv_records(content) if path.suffix == ".csv" else _json_records(content)
    return _table(_metadata_row(where, record, lines) for where, record in records)


def read_meta_cap(path: Path, lines: Lines) -> Table:
    """Return the rows of sd-scripts' meta_cap.json: a picture's name or path, its caption, and its tags after that."""
    try:
        content = json.loads(read_text(path))
    except CaptionError as error:
        return Table((), (str(error),))
    except (ValueError, RecursionError) as error:
        return Table((), (f"is not JSON: {error}",))
    if not isinstance(content, dict):
        return Table((), ("holds no table of pictures; sd-scripts writes one with the pictures' names as keys",))
    return _table(_meta_cap_row(name, record, lines) for name, record in content.items())


def _table(found: Iterator[Row | str]) -> Table:
    results = list(found)
    return Table(
        tuple(row for row in results if isinstance(row, Row)), tuple(what for what in results if isinstance(what, str))
    )


def _json_records(content: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", error


def _csv_records(content: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        for record in reader:
            yield f"line {reader.line_num}", record
    except csv.Error as error:
        yield f"line {reader.line_num}", error


def _metadata_row(where: str, record: Any, lines: Lines) -> Row | str:
    if isinstance(record, Exception):
        return f"{where} cannot be read: {record}"
    if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
        return f'{where} names no picture; it needs "file_name", the picture\'s path below this folder'
    key = next((key for key in _TEXT_KEYS if record.get(key) is not None), None)
    if key is None:
        return f"{where} has no caption; it needs one of {', '.join(_TEXT_KEYS)}"
    texts = _texts(record[key], lines)
    if texts is None:
        return f"{where}: `{key}` is {type(record[key]).__name__}, not a text or a list of texts"
    return Row(where, record["file_name"], texts)


def _meta_cap_row(name: str, record: Any, lines: Lines) -> Row | str:
    found = [record.get(key) for key in ("caption", "tags")] if isinstance(record, dict) else [record]
    parts = [part for part in found if isinstance(part, str)]
    if not isinstance(record, dict) or len(parts) < sum(part is not None for part in found):
        return f"{name!r}: needs `caption` or `tags`, which are texts"
    return Row(repr(name), name, texts_of(", ".join(part for part in parts if part), lines))


def _texts(value: Any, lines: Lines) -> tuple[str, ...] | None:
    """Return the texts of a value of a table; None if it holds something else."""
    if isinstance(value, str):
        return texts_of(value, lines)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return texts_of("\n".join(value), lines)
    return None
