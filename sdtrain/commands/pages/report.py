"""`sdtrain report`: writes the page of a run anew, from the files in its folder; no torch."""

from __future__ import annotations

from pathlib import Path

from sdtrain.commands.run_facts import facts_of, is_run
from sdtrain.errors import user_error
from sdtrain.training.watching.report.page import write_page
from sdtrain.training.watching.report.pictures import Shelf


def write_report(folder: Path) -> Path:
    """Write `report.html` of a run, finished or not; return its path. Raises UserError where there is no run."""
    if not folder.is_dir() or not is_run(folder):
        raise user_error(
            str(folder), "RUN", "there is no run in this folder; name one that holds a config.toml and a log.jsonl"
        )
    return write_page(folder, facts_of(folder).standing, Shelf())
