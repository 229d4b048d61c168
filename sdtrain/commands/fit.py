"""`sdtrain fit`: reads the settings, refuses what cannot work, then trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sdtrain.commands.libraries import quiet_libraries
from sdtrain.commands.notes import notes
from sdtrain.config.draft import Draft, draft_of_config
from sdtrain.config.from_python import chosen_settings
from sdtrain.config.read import overridden, read_written
from sdtrain.config.schema import Config
from sdtrain.training.start import draft_run, inspect_run, require_own_folder, run_folder
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
    watchers: Sequence[Watcher] = (),
    console: Console | None = None,
) -> FitResult:
    """Train what a config says, as `sdtrain fit` does; Ctrl-C stops it between two steps, with the state saved.

    Args:
        config: a config, or the path of a TOML file. A config made in Python gets its preset's values and is checked as
            a file is.
        overrides: settings to change, each as `key=value`, like `--set` on the command line.
        resume: go on from the last training state of this run.
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
        written = read_written(Path(config), overrides)
    return fit_draft(draft_run(written, resume=resume), screen, resume=resume, watchers=watchers)


def fit_config(path: Path, overrides: Sequence[str], console: Console, *, resume: bool) -> FitResult:
    """Train what a config file says. Raises UserError, see `fit`."""
    return fit_draft(draft_run(read_written(path, overrides), resume=resume), console, resume=resume)


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
    draft: Draft, console: Console, *, resume: bool, fetch: bool = True, watchers: Sequence[Watcher] = ()
) -> FitResult:
    """Train what a draft says. Raises UserError if anything is wrong with it, its model or its pictures."""
    opened, examples = inspect_run(draft, decode=False, fetch=fetch)
    for line in notes(draft.config, opened):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    quiet_libraries()  # not before: fetching a model shows its progress
    from sdtrain.training.fit import fit as train  # what can be told without torch has been told

    config = draft.config
    steps = train(config, opened, examples, console, resume=resume, watchers=watchers)
    folder = run_folder(config.output, config.name)
    finished = steps == config.steps
    return FitResult(folder, steps, finished, folder / "weights" / f"{config.name}.safetensors" if finished else None)
