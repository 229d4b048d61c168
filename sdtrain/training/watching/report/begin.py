"""Begins the page of a run: with what is known of it before its first step and stands in no other file."""

from __future__ import annotations

import torch

from sdtrain.training.keeping.standing import Standing
from sdtrain.training.run import Run
from sdtrain.training.watching.report.about import About, Told, about_now
from sdtrain.training.watching.report.watcher import ReportWriter


def report_writer(run: Run, standing: Standing, told: Told) -> ReportWriter:
    """Return the watcher that writes `report.html`. told: what the user was told before the run began."""
    return ReportWriter(run.folder, about_run(run, standing, told))


def about_run(run: Run, standing: Standing, told: Told) -> About:
    """Return what is told of a sitting: machine, versions, pictures and what was noted."""
    pictures = list(told.pictures)
    if standing.held_out:
        pictures.append(f"held out: {len(standing.held_out)} pictures, which are only validated on")
    precision = str(run.dtype).removeprefix("torch.")
    return about_now(_device_words(run), precision, Told(tuple(pictures), (*told.notes, *standing.notes)))


def _device_words(run: Run) -> str:
    if run.device.type != "cuda":
        return f"{run.device.type}, {torch.get_num_threads()} threads"
    card = torch.cuda.get_device_properties(run.device)
    return f"{card.name}, {card.total_memory / 2**30:.1f} GiB"
