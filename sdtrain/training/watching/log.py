"""Writes `log.jsonl`: one line per step and one per note, for people and programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdtrain.files.writer import write_text
from sdtrain.training.watching.records import NoteRecord, Record, StepRecord, Watcher


@contextmanager
def log_to(path: Path, first_step: int) -> Iterator[Watcher]:
    """Give a watcher that appends every step and note to the log; lines of steps after `first_step` are dropped
    before."""
    _drop_records_after(path, first_step)
    with path.open("a", encoding="utf-8") as file:

        def write(record: Record) -> None:
            match record:
                case StepRecord():
                    line = log_line(record)
                case NoteRecord():
                    line = note_line(record)
                case _:
                    return
            file.write(line + "\n")
            file.flush()

        yield write


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
            "groups": groups,
        }
    )


def note_line(record: NoteRecord) -> str:
    """Return a note as a line of JSON of its own, told from those of steps by its key `note`."""
    return json.dumps({"step": record.step, "note": record.text}, ensure_ascii=False)


def _drop_records_after(path: Path, step: int) -> None:
    """Drop the lines of later steps: a resumed run goes on from its last training state and does them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the line that was being written when the run was killed
    write_text(path, "".join(kept))
