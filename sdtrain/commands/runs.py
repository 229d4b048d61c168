"""`sdtrain runs`: lists runs, how far they are, and how to go on; no torch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sdtrain.commands.run_facts import RunFacts, facts_of, is_run, size_text
from sdtrain.errors import user_error
from sdtrain.training.watching.text import say


def list_runs(folder: Path, console: Console) -> list[RunFacts]:
    """Print the runs in a folder, or the run that it is, two lines each; return what was found. Raises UserError."""
    if not folder.is_dir():
        raise user_error(
            str(folder), "FOLDER", "no such folder; name the folder of your runs, `output` in their configs"
        )
    folders = [folder] if is_run(folder) else sorted(entry for entry in folder.iterdir() if entry.is_dir())
    found = [facts_of(entry) for entry in folders if is_run(entry)]
    if not found:
        say(console, f"no runs in {folder}")
    rows = [_row(facts) for facts in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    for facts, row in zip(found, rows, strict=True):
        say(console, "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        say(console, f"    {facts.go_on()}")
    return found


def _row(facts: RunFacts) -> tuple[str, ...]:
    steps = facts.config.steps if facts.config else "?"
    loss = "" if facts.last.loss is None else f"loss {facts.last.loss:.4f}"
    return facts.folder.name, facts.standing, f"{facts.step} of {steps} steps", loss, size_text(facts.num_bytes)


def run_answer(facts: RunFacts) -> dict[str, object]:
    """Return how a run stands, for `--json`."""
    return {
        "folder": str(facts.folder),
        "standing": facts.standing,
        "step": facts.step,
        "steps": facts.config.steps if facts.config else None,
        "loss": facts.last.loss,
        "states": list(facts.states),
        "num_bytes": facts.num_bytes,
        "damage": facts.damage,
    }
