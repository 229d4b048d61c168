"""`sdtrain fit`: reads the settings, refuses what cannot work, then trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from rich.console import Console

from sdtrain.commands.libraries import quiet_libraries, quiet_pillow
from sdtrain.commands.notes import note_lines, picture_report_notes, setting_notes
from sdtrain.config.draft import Draft, Written, draft_of
from sdtrain.config.from_python import chosen_settings
from sdtrain.config.read import overridden, read_written
from sdtrain.config.schema import Config
from sdtrain.data.identity.held_out import training_examples
from sdtrain.data.report.summary import summarise
from sdtrain.training.ending.one_process import only_process, refuse_several_ranks
from sdtrain.training.ending.signals import StopRequests, speaker, stop_requests
from sdtrain.training.keeping.manifest import INDEX
from sdtrain.training.keeping.standing import find_standing
from sdtrain.training.keeping.stored import readable_config
from sdtrain.training.start import draft_run, inspect_run, run_folder
from sdtrain.training.watching.progress import ProgressLines
from sdtrain.training.watching.records import Watcher
from sdtrain.training.watching.terminal import outliving
from sdtrain.training.watching.text import say

Resume: TypeAlias = bool | Literal["auto"]
"""Whether a run goes on; `auto` is whether it can."""


@dataclass(frozen=True)
class FitResult:
    """What a run left behind."""

    folder: Path
    """The run's folder."""
    steps: int
    """The number of steps that are done, those of earlier sittings included."""
    finished: bool
    """Whether all planned steps are done, or as many as `validation.patience` found enough.

    Else the run was stopped, and `resume=True` goes on.
    """
    weights: Path | None
    """The file with the averaged weights; None where the run is not finished."""
    stopped_by: int = 0
    """The number of the signal that stopped the run; 0 where none did."""

    @property
    def exit_code(self) -> int:
        """0 for a finished run; else 128 and the signal's number, as a shell says it."""
        return 128 + self.stopped_by if self.stopped_by else 0


def fit(
    config: Config | Path | str,
    *,
    overrides: Sequence[str] = (),
    resume: Resume = False,
    accept_data: bool = False,
    watchers: Sequence[Watcher] = (),
    console: Console | None = None,
) -> FitResult:
    """Train what a config says, as `sdtrain fit` does; Ctrl-C stops it between two steps, with the state saved.

    Args:
        config: a config, or the path of a TOML file. A config made in Python gets its preset's values and is checked as
            a file is.
        overrides: settings to change, each as `key=value`, like `--set` on the command line.
        resume: go on from the last training state of this run. `auto`: go on if there is one, else start; a run that
            is finished is left as it is.
        accept_data: go on with pictures that were added, removed or changed since that state.
        watchers: functions that are handed a frozen record of everything that happens (`sdtrain.Record`). One that
            raises is dropped for the rest of the run, which is told once; the training never notices.
        console: where progress is shown; None: nowhere. `log.jsonl` is written anyway.

    Raises:
        UserError: everything that can be known to be wrong beforehand, together; later, a loss that stays not finite,
            or too little memory. Whatever is raised after the first step, what was reached is saved before.
        KeyboardInterrupt: Ctrl-C came before the first step, or twice.
    """
    screen = console or Console(quiet=True, force_terminal=False)
    if isinstance(config, Config):
        written = overridden(chosen_settings(config), "config", overrides)
    else:
        written = read_written(readable_config(Path(config), resume=bool(resume)), overrides)
    with stop_requests(speaker(screen)) as stop:
        return _fit_written(written, screen, stop, resume=resume, accept_data=accept_data, watchers=watchers)


def fit_config(
    path: Path, overrides: Sequence[str], console: Console, *, resume: Resume, accept_data: bool = False
) -> FitResult:
    """Train what a config file says; a second Ctrl-C ends the process. Raises UserError, see `fit`, and Interrupted."""
    readable = readable_config(path, resume=bool(resume))
    if readable != path:
        say(console, f"{path} is gone or damaged: reading its copy, {readable}")
    with stop_requests(speaker(console), leave=True) as stop:
        written = read_written(readable, overrides)
        return _fit_written(written, console, stop, resume=resume, accept_data=accept_data)


def _fit_written(
    written: Written,
    console: Console,
    stop: StopRequests,
    *,
    resume: Resume,
    accept_data: bool,
    watchers: Sequence[Watcher] = (),
) -> FitResult:
    """Train what a table says, as the only process in the run's folder."""
    refuse_several_ranks(os.environ)
    draft = draft_run(written, resume=_resumes(written, resume), accept_data=accept_data)
    if not draft.is_sound:  # nothing will be written, so nothing is locked; what else is wrong is told together
        return _fit_draft(draft, console, stop, resume=resume is True, accept_data=accept_data, watchers=watchers)
    with only_process(run_folder(draft.config.output, draft.config.name)):
        resumes = _resumes(written, resume)
        draft = draft_run(written, resume=resumes, accept_data=accept_data)  # a process may have ended in this moment
        if resume == "auto" and draft.is_sound and (done := _finished(draft.config)):
            say(console, _done(done))
            return done
        return _fit_draft(draft, console, stop, resume=resumes, accept_data=accept_data, watchers=watchers)


def _resumes(written: Written, resume: Resume) -> bool:
    """Return whether a run goes on: for `auto`, whether there is one whose settings were written down."""
    if resume != "auto":
        return resume
    draft = draft_of(written)
    folder = run_folder(draft.config.output, draft.config.name)
    return draft.knows("name", "output") and (folder / "config.toml").exists()


def _finished(config: Config) -> FitResult | None:
    """Return what a run left that has done all its steps; None where there is something left to do."""
    folder = run_folder(config.output, config.name)
    weights = folder / "weights" / f"{config.name}.safetensors"
    state = folder / "checkpoints" / f"step-{config.steps:06d}" / INDEX
    return FitResult(folder, config.steps, True, weights) if weights.exists() and state.exists() else None


def _done(result: FitResult) -> str:
    return f"done: all {result.steps} steps; {result.weights}"


def _fit_draft(
    draft: Draft,
    console: Console,
    stop: StopRequests,
    *,
    resume: bool,
    accept_data: bool = False,
    watchers: Sequence[Watcher] = (),
) -> FitResult:
    """Train what a draft says. Raises UserError if anything is wrong with it, its model, its pictures or its states."""
    with outliving(console):
        stop.doing = "reading the model and the pictures"
        quiet_pillow()
        with ProgressLines(console) as progress:
            opened, examples = inspect_run(draft, decode=False, fetch=True, on_progress=progress.show)
        config, trained = draft.config, training_examples(examples)
        folder = run_folder(config.output, config.name)
        with ProgressLines(console) as progress:
            standing = find_standing(
                *(config, folder, opened, examples),
                resume=resume,
                accept_data=accept_data,
                on_progress=progress.show,
            )
        pictures = picture_report_notes(config, opened, trained, summarise(trained, config.data))
        say(console, *note_lines([*setting_notes(config, opened), *pictures]))
        stop.doing = "loading PyTorch"
        quiet_libraries()  # not before: fetching a model shows its progress
        from sdtrain.training.fit import fit as train  # what can be told without torch has been told

        steps, is_finished = train(config, opened, standing, console, stop, watchers=watchers)
        if is_finished:
            return FitResult(folder, steps, True, folder / "weights" / f"{config.name}.safetensors")
        return FitResult(folder, steps, False, None, stop.number)
