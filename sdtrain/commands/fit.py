"""`sdtrain fit`: reads the settings, refuses what cannot work, then trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sdtrain.commands.libraries import quiet_libraries, quiet_pillow
from sdtrain.commands.notes import note_lines, picture_report_notes
from sdtrain.config.draft import Draft, draft_of_config
from sdtrain.config.from_python import chosen_settings
from sdtrain.config.read import overridden, read_written
from sdtrain.config.schema import Config
from sdtrain.data.report.summary import summarise
from sdtrain.training.keeping.standing import find_standing
from sdtrain.training.keeping.stored import readable_config
from sdtrain.training.start import draft_run, inspect_run, require_own_folder, run_folder
from sdtrain.training.watching.progress import ProgressLines
from sdtrain.training.watching.records import Watcher


@dataclass(frozen=True)
class FitResult:
    """What a run left behind."""

    folder: Path
    """The run's folder."""
    steps: int
    """The number of steps that are done, those of earlier sittings included."""
    finished: bool
    """Whether all planned steps are done; else the run was stopped, and `resume=True` goes on."""
    weights: Path | None
    """The file with the averaged weights; None where the run is not finished."""


def fit(
    config: Config | Path | str,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    accept_data: bool = False,
    watchers: Sequence[Watcher] = (),
    console: Console | None = None,
) -> FitResult:
    """Train what a config says, as `sdtrain fit` does; Ctrl-C stops it between two steps, with the state saved.

    Args:
        config: a config, or the path of a TOML file. A config made in Python gets its preset's values and is checked as
            a file is.
        overrides: settings to change, each as `key=value`, like `--set` on the command line.
        resume: go on from the last training state of this run.
        accept_data: go on with pictures that were added, removed or changed since that state.
        watchers: functions that are handed a frozen record of everything that happens (`sdtrain.Record`). One that
            raises is dropped for the rest of the run, which is told once; the training never notices.
        console: where progress is shown; None: nowhere. `log.jsonl` is written anyway.

    Raises:
        UserError: everything that can be known to be wrong beforehand, together; later, a loss that stays not finite.
    """
    screen = console or Console(quiet=True, force_terminal=False)
    if isinstance(config, Config):
        written = overridden(chosen_settings(config), "config", overrides)
    else:
        written = read_written(readable_config(Path(config), resume=resume), overrides)
    draft = draft_run(written, resume=resume, accept_data=accept_data)
    return fit_draft(draft, screen, resume=resume, accept_data=accept_data, watchers=watchers)


def fit_config(
    path: Path, overrides: Sequence[str], console: Console, *, resume: bool, accept_data: bool = False
) -> FitResult:
    """Train what a config file says. Raises UserError, see `fit`."""
    readable = readable_config(path, resume=resume)
    if readable != path:
        console.print(f"{path} is gone or damaged: reading its copy, {readable}", markup=False, soft_wrap=True)
    draft = draft_run(read_written(readable, overrides), resume=resume, accept_data=accept_data)
    return fit_draft(draft, console, resume=resume, accept_data=accept_data)


def fit_settings(
    config: Config,
    source: str,
    console: Console,
    *,
    resume: bool,
    fetch: bool = True,
    watchers: Sequence[Watcher] = (),
) -> FitResult:
    """Train what settings say. Raises UserError, see `fit`.

    source: what the settings were read from, which messages name. fetch: whether a model that is named by a hub id
    and not in the local cache is fetched.
    """
    require_own_folder(config, source, resume=resume)
    return fit_draft(draft_of_config(config, source), console, resume=resume, fetch=fetch, watchers=watchers)


def fit_draft(
    draft: Draft,
    console: Console,
    *,
    resume: bool,
    accept_data: bool = False,
    fetch: bool = True,
    watchers: Sequence[Watcher] = (),
) -> FitResult:
    """Train what a draft says. Raises UserError if anything is wrong with it, its model, its pictures or its states."""
    quiet_pillow()
    with ProgressLines(console) as progress:
        opened, examples = inspect_run(draft, decode=False, fetch=fetch, on_progress=progress.show)
    config = draft.config
    folder = run_folder(config.output, config.name)
    with ProgressLines(console) as progress:
        standing = find_standing(
            *(config, folder, opened, examples),
            resume=resume,
            accept_data=accept_data,
            on_progress=progress.show,
        )
    quiet_libraries()  # not before: fetching a model shows its progress
    report = summarise(examples, draft.config.data)
    for line in note_lines(picture_report_notes(draft.config, opened, examples, report)):
        console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
    from sdtrain.training.fit import fit as train  # what can be told without torch has been told

    steps = train(config, opened, standing, console, watchers=watchers)
    finished = steps == config.steps
    return FitResult(folder, steps, finished, folder / "weights" / f"{config.name}.safetensors" if finished else None)
