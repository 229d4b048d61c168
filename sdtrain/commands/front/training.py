"""The commands before and in training as the command line has them: each reads options and calls one function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from sdtrain.commands.front.command_line import Json, check_as_json
from sdtrain.commands.front.options import ConfigPath, Overrides, VerifyCache
from sdtrain.commands.libraries import quiet_libraries
from sdtrain.errors import Interrupted, user_error
from sdtrain.training.ranks.group import ToldElsewhereError


def fit(
    config: ConfigPath,
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last training state of this run.")] = False,
    accept_data: Annotated[
        bool, typer.Option("--accept-data", help="With --resume: go on with pictures that have changed since.")
    ] = False,
    verify_cache: VerifyCache = False,
    resume_or_start: Annotated[
        bool,
        typer.Option(
            "--resume-or-start",
            help="Go on if this run was begun, start if not, and do nothing if it is finished: for job scripts.",
        ),
    ] = False,
    gpus: Annotated[
        int,
        typer.Option(
            "--gpus", metavar="NUMBER", min=1, help="Train on so many cards of this machine, one process each."
        ),
    ] = 1,
) -> None:
    """Train what CONFIG says.

    Exit codes: 0 done; 2 something to mend first; 4 losses or gradients stayed not finite; 1 another error, with what
    was reached saved; 130, 143, 129, 138 stopped by Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, with what was reached saved.
    """
    from sdtrain.commands.fit import fit_config, is_launched, launch_fit

    if gpus > 1 and not is_launched():
        raise typer.Exit(launch_fit(gpus, config, set_ or [], sys.argv[1:]))
    try:
        how: Literal["auto"] | bool = "auto" if resume_or_start else resume
        done = fit_config(config, set_ or [], Console(), resume=how, accept_data=accept_data, verify_cache=verify_cache)
        code = done.exit_code
    except (Interrupted, ToldElsewhereError) as ended:  # which was told already
        code = ended.exit_code
    raise typer.Exit(code)


def check(config: ConfigPath, set_: Overrides = None, as_json: Json = False) -> None:
    """Find every mistake in CONFIG, its model and its pictures, without training."""
    from sdtrain.commands.check import check_config

    if as_json:
        check_as_json(config, set_ or [])
    else:
        check_config(config, set_ or [], Console())


def view(
    config: ConfigPath,
    set_: Overrides = None,
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="NUMBER", min=1, help="Print what this step trains on, counted from 1."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="The contact sheet to write; default OUTPUT/NAME-sheet.html."),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Draw the contact sheet as a picture, too.")] = False,
) -> None:
    """Write a contact sheet of what the model will see: crops, tokens and notes; or print what a step trains on."""
    if step is None:
        from sdtrain.commands.sheet.write import write_sheet

        write_sheet(config, set_ or [], out, Console(), png=png)
        return
    if out is not None or png:
        raise user_error("view", "--step", "prints and writes nothing; leave out --out and --png, or --step")
    quiet_libraries()
    from sdtrain.commands.view import view_step

    view_step(config, set_ or [], step, Console())


def plan(
    config: ConfigPath,
    set_: Overrides = None,
    fit_to: Annotated[
        str,
        typer.Option(
            "--fit-to", metavar="SIZE", help="Find the cheapest settings that fit into a memory, such as 8GB."
        ),
    ] = "",
) -> None:
    """Say what a run will need (memory by phase, disk, arithmetic), without a GPU and without reading weights."""
    quiet_libraries()
    from sdtrain.commands.front.plan import plan_config

    plan_config(config, set_ or [], Console(), budget=fit_to)


def cache(
    config: Annotated[
        list[Path], typer.Argument(metavar="CONFIG...", help="Configs, .toml files.", show_default=False)
    ],
    size: Annotated[bool, typer.Option("--size", help="Only say what lies there and how much is used.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove what none of these configs uses, and what kills left.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --prune: remove without asking.")] = False,
    verify_cache: VerifyCache = False,
    set_: Overrides = None,
) -> None:
    """Encode pictures and captions ahead of a run, on any machine that has the same model; see also --size, --prune.

    --prune removes nothing but cached encodings. Give it the configs of all runs that share the cache: those that are
    still going on, too.
    """
    if size + prune + verify_cache > 1 or (yes and not prune):
        raise user_error("cache", "options", "give one of --size, --prune and --verify-cache; --yes belongs to --prune")
    quiet_libraries()
    from sdtrain.commands.files.cache import fill_cache, prune_caches, size_up

    console, overrides = Console(), set_ or []
    if size:
        size_up(config, overrides, console)
    elif prune:
        prune_caches(config, overrides, console, yes=yes, ask=typer.confirm if sys.stdin.isatty() else None)
    else:
        fill_cache(config, overrides, console, verify=verify_cache)


def verify_resume(
    config: ConfigPath,
    steps: Annotated[int, typer.Option("--steps", help="Steps of each of the two runs.")] = 8,
    set_: Overrides = None,
) -> None:
    """Prove on this machine that a run which is interrupted equals one that is not, bit for bit."""
    quiet_libraries()
    from sdtrain.commands.verify_resume import verify_resume as run_verify_resume

    if not run_verify_resume(config, set_ or [], Console(), steps=steps):
        raise typer.Exit(1)


def add_training(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    for command in (fit, check, view, plan, cache):
        app.command()(command)
    app.command("verify-resume")(verify_resume)
