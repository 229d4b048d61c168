"""Writes `log.jsonl`: one line per step, per validation and per note, for people and programs."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from sdtrain.errors import UserError
from sdtrain.files.writer import reason, sync, write_bytes
from sdtrain.training.watching.records import NoteRecord, Record, StepRecord, ValidationRecord


class Log:
    """Appends every step to the log. Lines that cannot be written now are kept, and written when they can be."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Lines of steps after `first_step` are dropped: a resumed run does these steps again."""
        self._path, self._first_step = path, first_step
        self._file: FileIO | None = None
        self._waiting = b""
        self._name_is_kept = False

    def see(self, record: Record) -> None:
        """Write the line of a record that has one, and those that wait. Raises OSError when they wait longer."""
        match record:
            case StepRecord():
                line = log_line(record)
            case ValidationRecord():
                line = validation_line(record)
            case NoteRecord():
                line = note_line(record)
            case _:
                return
        self._waiting += (line + "\n").encode("utf-8", "replace")
        self.write()

    def write(self) -> None:
        """Write the lines that wait. Raises OSError, with nothing written, when they have to wait longer."""
        file = self._file or self._open()
        end = file.seek(0, 2)
        try:
            if file.write(self._waiting) != len(self._waiting):
                raise OSError("only a part of a line could be written")
        except OSError:
            with contextlib.suppress(OSError):  # half a line is dropped by whoever reads the log
                file.truncate(end)
            raise
        self._waiting = b""

    def _open(self) -> FileIO:
        try:
            _drop_records_after(self._path, self._first_step)
        except UserError as error:
            raise OSError(reason(error)) from error
        self._file = FileIO(self._path, "a")
        return self._file

    def flush(self) -> None:
        """Make the lines that were written outlive a power cut. Raises OSError where the disk does not confirm it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            if not self._name_is_kept:
                sync(self._path.parent)
                self._name_is_kept = True

    def close(self) -> None:
        """Close the file. Lines that still wait are lost; raises OSError then."""
        try:
            if self._waiting:
                self.write()
        finally:
            if self._file is not None:
                self._file.close()


@contextmanager
def log_to(path: Path, first_step: int) -> Iterator[Log]:
    """Give the log of a run, whose lines of steps after `first_step` are dropped."""
    log = Log(path, first_step)
    try:
        yield log
    finally:
        with contextlib.suppress(OSError):  # that it cannot be written was told when it began
            log.close()


def log_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log that belong to a step, whatever state the file is in.

    Lines that cannot be read, such as one that a kill cut off, are passed over; a log that is not there has none.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                if isinstance(line, dict) and type(line.get("step")) is int:
                    yield line
    except OSError:
        return


def log_line(record: StepRecord) -> str:
    """Return a step as a line of JSON; a loss that is not finite is null, for JSON has no number for it."""
    groups = {
        group.name: {
            "d": group.d,
            "applied_d": group.applied_d,
            "effective_lr": group.effective_lr,
            "frozen": group.frozen,
            **({"stopped": True} if group.stopped else {}),
        }
        for group in record.groups
    }
    return json.dumps(
        {
            "step": record.step,
            "loss": record.loss if math.isfinite(record.loss) else None,
            "images_per_s": round(record.images_per_s, 3),
            **({} if record.peak_memory_gib is None else {"peak_memory_gib": round(record.peak_memory_gib, 3)}),
            **({"skipped": True, "pictures": list(record.pictures)} if record.skipped else {}),
            "groups": groups,
        }
    )


def validation_line(record: ValidationRecord) -> str:
    """Return a validation as a line of JSON of its own, told from those of steps by its key `validation`."""
    found = {
        "loss": record.loss if math.isfinite(record.loss) else None,
        "standard_error": record.standard_error if math.isfinite(record.standard_error) else None,
        "pictures": record.num_pictures,
        "best_step": record.best_step,
    }
    return json.dumps({"step": record.step, "validation": found})


def note_line(record: NoteRecord) -> str:
    """Return a note as a line of JSON of its own, told from those of steps by its key `note`."""
    return json.dumps({"step": record.step, "note": record.text}, ensure_ascii=False)


def _drop_records_after(path: Path, step: int) -> None:
    """Drop the lines of later steps: a resumed run goes on from its last training state and does them again."""
    if not path.exists():
        return
    kept = [line + b"\n" for line in path.read_bytes().splitlines() if _belongs_before(line, step)]
    write_bytes(path, b"".join(kept))


def _belongs_before(line: bytes, step: int) -> bool:
    """Return whether a line is a record of a step up to `step`; anything else was cut by a kill, or is not ours."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or a number of 5,000 digits
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step
