"""Begins the page of a run: with what is known of it before its first step and stands in no other file."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdtrain.config.schema import Config
from sdtrain.data.report import report_lines, summarise
from sdtrain.training.keeping.standing import Standing
from sdtrain.training.run import Run
from sdtrain.training.watching.report.about import About, about_now
from sdtrain.training.watching.report.watcher import ReportWriter


def report_writer(run: Run, standing: Standing, notes: Sequence[str]) -> ReportWriter:
    """Return the watcher that writes `report.html`. notes: what the user was told before the run began."""
    return ReportWriter(run.folder, about_run(run, standing, notes))


def about_run(run: Run, standing: Standing, notes: Sequence[str]) -> About:
    """Return what is told of a sitting: machine, versions, pictures and what was noted."""
    lines = report_lines(summarise(standing.examples, run.config.data)) if standing.examples else []
    if standing.held_out:
        lines.append(f"held out: {len(standing.held_out)} pictures, which are only validated on")
    precision = str(run.dtype).removeprefix("torch.")
    return about_now(_device_words(run), precision, lines, [*_uncaptioned(run.config, standing), *notes])


def _device_words(run: Run) -> str:
    if run.device.type != "cuda":
        return f"{run.device.type}, {torch.get_num_threads()} threads"
    card = torch.cuda.get_device_properties(run.device)
    return f"{card.name}, {card.total_memory / 2**30:.1f} GiB"


def _uncaptioned(config: Config, standing: Standing) -> list[str]:
    """Return a note on pictures without a caption, which the settings allow and a person may not expect."""
    num = sum(not example.caption for example in standing.examples)
    return [f"note: {num} of {len(standing.examples)} pictures have no caption or an empty one"] if num else []
