"""`sdtrain fit`: reads the settings, refuses what cannot work, then trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from rich.console import Console

from sdtrain.commands.libraries import (
    importing_less,
    look_for_garbage,
    quiet_libraries,
    quiet_pillow,
    versions,
)
from sdtrain.commands.notes import note_lines, picture_report_notes, setting_notes
from sdtrain.config.draft import Written, draft_of
from sdtrain.config.from_python import chosen_settings
from sdtrain.config.read import overridden, read_written
from sdtrain.config.schema import Config
from sdtrain.data.identity.held_out import training_examples
from sdtrain.data.report.facts import fact_lines
from sdtrain.data.report.previewed import with_prompts
from sdtrain.data.report.summary import summarise
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.ending.one_process import only_process
from sdtrain.training.ending.signals import StopRequests, speaker, stop_requests
from sdtrain.training.keeping.leftovers import remove_leftovers
from sdtrain.training.keeping.manifest import INDEX
from sdtrain.training.keeping.standing import Standing, find_standing
from sdtrain.training.keeping.stored import readable_config
from sdtrain.training.ranks.group import Ranks, joined
from sdtrain.training.ranks.place import place_of
from sdtrain.training.ranks.refused import facts_of, rank_problems
from sdtrain.training.start import draft_run, inspect_run, run_folder
from sdtrain.training.watching.progress import ProgressLines, waiting
from sdtrain.training.watching.records import Watcher
from sdtrain.training.watching.report.about import Told
from sdtrain.training.watching.terminal import Consoles, outliving
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
    verify_cache: bool = False,
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
        verify_cache: read every byte of the pictures and of the cache, also where nothing seems to have changed.
        watchers: functions that are handed a frozen record of everything that happens (`sdtrain.Record`). One that
            raises is dropped for the rest of the run, which is told once; the training never notices.
        console: where progress is shown; None: nowhere. `log.jsonl` is written anyway.

    Raises:
        UserError: everything that can be known to be wrong beforehand, together; later, a loss that stays not finite,
            or too little memory. Whatever is raised after the first step, what was reached is saved before.
        KeyboardInterrupt: Ctrl-C came before the first step, or twice.
    """
    screen = _screen(console or Console(quiet=True, force_terminal=False))
    if isinstance(config, Config):
        written = overridden(chosen_settings(config), "config", overrides)
    else:
        written = read_written(readable_config(Path(config), resume=bool(resume)), overrides)
    with stop_requests(speaker(screen)) as stop:
        return _fit_written(
            *(written, Consoles(screen, screen), stop),
            resume=resume,
            accept_data=accept_data,
            verify_cache=verify_cache,
            watchers=watchers,
        )


def fit_config(
    path: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    resume: Resume,
    accept_data: bool = False,
    verify_cache: bool = False,
    result: Console | None = None,
) -> FitResult:
    """Train what a config file says; a second Ctrl-C ends the process. Raises UserError, see `fit`, and Interrupted.

    result: where it is told what came of it; None: on the console, too.
    """
    console = _screen(console)
    readable = readable_config(path, resume=bool(resume))
    if readable != path:
        say(console, f"{path} is gone or damaged: reading its copy, {readable}")
    return fit_table(
        *(lambda: read_written(readable, overrides), console),
        resume=resume,
        accept_data=accept_data,
        verify_cache=verify_cache,
        result=result,
    )


def fit_table(
    read: Callable[[], Written],
    console: Console,
    *,
    resume: Resume,
    accept_data: bool,
    verify_cache: bool,
    result: Console | None = None,
) -> FitResult:
    """Train what a table says that `read` returns; as `fit_config` does."""
    console, result = _screen(console), _screen(result or console)
    with stop_requests(speaker(result if console.quiet else console), leave=True) as stop:
        stop.doing = "reading the settings"
        return _fit_written(
            *(read(), Consoles(console, result), stop),
            resume=resume,
            accept_data=accept_data,
            verify_cache=verify_cache,
        )


def is_launched() -> bool:
    """Return whether this process is one of several that a launcher started. Raises UserError, see `place_of`."""
    return place_of(os.environ).size > 1


def launch_fit(num: int, written: Written, arguments: Sequence[str]) -> int:
    """Run this command with its `arguments` in `num` processes that train together; return the exit code.

    What is wrong with the settings, the first of them tells. Raises UserError where there are too few cards.
    """
    from sdtrain.commands.launch import launch

    draft = draft_of(written)
    return launch(num, arguments, on_cpu=draft.knows("device") and draft.config.device == "cpu")


def _screen(console: Console) -> Console:
    """Return the console; a silent one for the processes of a run that are not the first: one of them speaks."""
    return console if place_of(os.environ).is_first else Console(quiet=True, force_terminal=False)


def _fit_written(
    written: Written,
    consoles: Consoles,
    stop: StopRequests,
    *,
    resume: Resume,
    accept_data: bool,
    verify_cache: bool,
    watchers: Sequence[Watcher] = (),
) -> FitResult:
    """Train what a table says: alone in the run's folder, or as one of the processes of a launcher."""
    console, result = consoles.progress, consoles.result
    with outliving(console, result), joined(place_of(os.environ)) as ranks, ExitStack() as held:
        with ranks.first_alone():
            begun = _begin(
                *(written, consoles, stop, held, ranks),
                resume=resume,
                accept_data=accept_data,
                verify_cache=verify_cache,
            )
        if isinstance(begun, FitResult):
            return begun
        stop.doing = "loading PyTorch"
        quiet_libraries()  # not before: fetching a model shows its progress
        compiles, quantised = begun.config.memory.compile, begun.config.model.base_precision != "full"
        with importing_less(compiles=compiles, quantised=quantised):  # what can be told without torch has been told
            from sdtrain.training.fit import fit as train
            from sdtrain.training.planning.budget import expected
            from sdtrain.training.run import pick_device, repeatable

        stop.doing = "planning the memory"
        device = pick_device(begun.config, ranks.place.local_rank)
        held.enter_context(repeatable(begun.config, device))
        standing, size = begun.standing, ranks.place.size
        with waiting(console, "planning the memory"):
            will = expected(begun.config, begun.opened, standing.examples, standing.base, device, size)
        say(console, *will.notes)
        ranks.require_same(facts_of(will.config, begun.standing, versions()))
        config, folder = will.config, run_folder(will.config.output, will.config.name)
        look_for_garbage()
        steps, is_finished = train(
            *(config, begun.opened, begun.standing, console, stop),
            watchers=watchers,
            ranks=ranks,
            told=begun.told,
            expected=will,
            result=result,
        )
        if is_finished:
            return FitResult(folder, steps, True, folder / "weights" / f"{config.name}.safetensors")
        return FitResult(folder, steps, False, None, stop.number)


@dataclass(frozen=True)
class _Begun:
    """All that is known before PyTorch is loaded."""

    config: Config
    opened: OpenedModel
    standing: Standing
    told: Told


def _begin(
    written: Written,
    consoles: Consoles,
    stop: StopRequests,
    held: ExitStack,
    ranks: Ranks,
    *,
    resume: Resume,
    accept_data: bool,
    verify_cache: bool,
) -> _Begun | FitResult:
    """Return what a run begins with, or what it left where it is done; `held` takes the lock on its folder.

    Raises UserError if anything is wrong with it, its model, its pictures or its states.
    """
    console, resumes = consoles.progress, _resumes(written, resume)
    draft = draft_run(written, resume=resumes, accept_data=accept_data)
    if draft.is_sound:  # else nothing will be written, so nothing is locked, and what else is wrong is told together
        if ranks.is_first:
            held.enter_context(only_process(run_folder(draft.config.output, draft.config.name)))
        resumes = _resumes(written, resume)
        draft = draft_run(written, resume=resumes, accept_data=accept_data)  # a process may have ended in this moment
        if resume == "auto" and draft.is_sound and (done := _finished(draft.config)):
            if ranks.is_first:
                remove_leftovers(done.folder)  # of a kill in its last moment
            say(consoles.result, _done(done))
            return done
    draft = draft.with_problems(rank_problems(draft, ranks.place.size))
    stop.doing = "reading the model and the pictures"
    quiet_pillow()
    with ProgressLines(console) as progress:
        opened, examples = inspect_run(draft, decode=False, fetch=True, on_progress=progress.show)
    config, trained = with_prompts(draft.config, examples), training_examples(examples)
    with ProgressLines(console) as progress:
        standing = find_standing(
            *(config, run_folder(config.output, config.name), opened, examples),
            resume=resumes,
            accept_data=accept_data,
            verify_cache=verify_cache,
            on_progress=progress.show,
        )
    report = summarise(trained, config.data)
    told = [*setting_notes(config, opened), *picture_report_notes(config, opened, trained, report)]
    say(console, *note_lines(told))
    return _Begun(config, opened, standing, Told(tuple(fact_lines(report, config.steps)), tuple(told)))


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
