"""The commands before and in training as the command line has them: each reads options and calls one function."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from sdtrain.commands.front.answers import answer
from sdtrain.commands.front.command_line import Json, PlainHelp, check_as_json
from sdtrain.commands.front.options import (
    ConfigPath,
    Model,
    Output,
    Overrides,
    PictureFolder,
    Steps,
    Trigger,
    VerifyCache,
)
from sdtrain.commands.libraries import importing_less, quiet_libraries
from sdtrain.errors import Interrupted, Problem, UserError, user_error
from sdtrain.training.ranks.group import ToldElsewhereError
from sdtrain.training.watching.terminal import consoles
from sdtrain.training.watching.text import facts_table, say, shell_word


def fit(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="The config, a .toml file; or none, and --model and --pictures."),
    ] = None,
    model: Model = "",
    pictures: PictureFolder = "",
    trigger: Trigger = "",
    steps: Steps = None,
    output: Output = "",
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
    plain: Annotated[
        bool, typer.Option("--plain", help="No display that is drawn anew: a line now and then, in ASCII.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Tell errors and the result, and nothing else.")] = False,
) -> None:
    """Train what CONFIG says; without one, a LoRA of --model on the pictures in --pictures.

    Exit codes: 0 done; 2 something to mend first; 4 losses or gradients stayed not finite; 1 another error, with what
    was reached saved; 130, 143, 129, 138 stopped by Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, with what was reached saved.
    """
    from sdtrain.commands.fit import fit_config, fit_table, is_launched, launch_fit
    from sdtrain.commands.starting.first_config import Wishes, written_first
    from sdtrain.config.read import read_written
    from sdtrain.training.keeping.stored import readable_config

    wishes = Wishes(model, pictures, trigger, steps, output=output, several_cards=gpus > 1 or is_launched())
    if config is None and not (model or pictures):
        what = "is missing: name a .toml file, which `sdtrain init` writes, or give --model and --pictures"
        raise user_error("fit", "CONFIG", what)
    if config is not None:
        _refuse_wishes({"--model": model, "--pictures": pictures, "--trigger": trigger})
        more = {"steps": steps, "output": output}
        overrides = [*(f"{key}={value}" for key, value in more.items() if value), *(set_ or [])]
    if plain and quiet:
        raise user_error("fit", "--plain", "tells more than --quiet does: give one of them")
    if gpus > 1 and not is_launched():
        written = (
            read_written(readable_config(config, resume=True), overrides)
            if config
            else written_first(wishes, set_ or [])
        )
        raise typer.Exit(launch_fit(gpus, written, sys.argv[1:]))
    try:
        how: Literal["auto"] | bool = "auto" if resume_or_start else resume
        shown = consoles(plain=plain, quiet=quiet)
        if config is not None:
            done = fit_config(
                *(config, overrides, shown.progress),
                resume=how,
                accept_data=accept_data,
                verify_cache=verify_cache,
                result=shown.result,
            )
        else:
            done = fit_table(
                *(lambda: written_first(wishes, set_ or [], resume=resume), shown.progress),
                resume=how,
                accept_data=accept_data,
                verify_cache=verify_cache,
                result=shown.result,
            )
        code = done.exit_code
    except (Interrupted, ToldElsewhereError) as ended:  # which was told already
        code = ended.exit_code
    raise typer.Exit(code)


def _refuse_wishes(given: dict[str, str]) -> None:
    """Raise UserError for options that belong to a run without a config, where there is one."""
    settings = {"--model": "model.path", "--pictures": "data.folder[0].path", "--trigger": "data.folder[0].trigger"}
    problems = [
        Problem(option, f"belongs to a run without CONFIG; with one use --set {settings[option]}={shell_word(value)}")
        for option, value in given.items()
        if value
    ]
    if problems:
        raise UserError("fit", problems)


def init(
    where: Annotated[
        Path,
        typer.Argument(metavar="[FOLDER or FILE]", help="The .toml file to write, or the folder of the pictures."),
    ] = Path(),
    model: Model = "",
    pictures: PictureFolder = "",
    trigger: Trigger = "",
    steps: Steps = None,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="Of the graphics card, such as 12GB; default: it is asked.")
    ] = "",
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Of the run; default the trigger or folder.")
    ] = "",
    output: Output = "",
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing: take what is there, or say what is missing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a first config, with the reasons in it, for your model and your pictures; what is not told is asked."""
    from sdtrain.commands.starting.first_config import Wishes
    from sdtrain.commands.starting.init import init as run_init
    from sdtrain.commands.starting.init import memory_of

    wishes = Wishes(model, pictures, trigger, steps, memory_of(memory) if memory else None, name, output)
    asks = not yes and not as_json and sys.stdin.isatty()
    file = run_init(where, wishes, Console(quiet=as_json), force=force, ask=_ask if asks else None)
    if as_json:
        answer("init", {"written": [file]})


def _ask(question: str, otherwise: str) -> str:
    """Ask a person; return the answer, or `otherwise` where there is none."""
    say(Console(), f"{question} [{otherwise}]" if otherwise else question)
    answer: str = typer.prompt("", prompt_suffix="> ", default=otherwise, show_default=False)
    return answer.strip()


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
    as_json: Json = False,
) -> None:
    """Write a contact sheet of what the model will see: crops, tokens and notes; or print what a step trains on."""
    if step is None:
        from sdtrain.commands.sheet.write import write_sheet

        written = write_sheet(config, set_ or [], out, Console(quiet=as_json), png=png)
        if as_json:
            answer("view", {"written": written})
        return
    if out is not None or png:
        raise user_error("view", "--step", "prints and writes nothing; leave out --out and --png, or --step")
    quiet_libraries()
    from sdtrain.commands.view import planned_step, step_answer, step_lines

    planned = planned_step(config, set_ or [], step)
    if as_json:
        answer("view", step_answer(planned))
    else:
        say(Console(), *step_lines(planned))


def plan(
    config: ConfigPath,
    set_: Overrides = None,
    fit_to: Annotated[
        str,
        typer.Option(
            "--fit-to", metavar="SIZE", help="Find the cheapest settings that fit into a memory, such as 8GB."
        ),
    ] = "",
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also make some steps on this machine, and say how long one takes."),
    ] = False,
    gpus: Annotated[
        int,
        typer.Option(
            "--gpus", metavar="NUMBER", min=1, help="Also reckon how much faster up to so many cards would be."
        ),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Say what a run will need (memory by phase, disk, arithmetic), without a GPU and without reading weights."""
    quiet_libraries()
    from sdtrain.commands.front.plan import plan_config

    try:
        found = plan_config(config, set_ or [], Console(quiet=as_json), budget=fit_to, measure=measure, gpus=gpus)
    except Interrupted as ended:  # which was told already
        raise typer.Exit(ended.exit_code) from ended
    if as_json:
        answer("plan", found)


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
    as_json: Json = False,
) -> None:
    """Encode pictures and captions ahead of a run, on any machine that has the same model; see also --size, --prune.

    --prune removes nothing but cached encodings. Give it the configs of all runs that share the cache: those that are
    still going on, too.
    """
    if size + prune + verify_cache > 1 or (yes and not prune):
        raise user_error("cache", "options", "give one of --size, --prune and --verify-cache; --yes belongs to --prune")
    quiet_libraries()
    with importing_less(quantised=False, networks=not (size or prune)):  # the U-Net stays where it is
        from sdtrain.commands.files.cache import fill_cache, prune_caches, size_up

    console, overrides = Console(quiet=as_json), set_ or []
    if size:
        found = size_up(config, overrides, console)
    elif prune:
        asks = sys.stdin.isatty() and not as_json
        found = prune_caches(config, overrides, console, yes=yes, ask=typer.confirm if asks else None)
    else:
        found = fill_cache(config, overrides, console, verify=verify_cache)
    if as_json:
        answer("cache", {"caches": [asdict(held) for held in found]})


def verify_resume(
    config: ConfigPath,
    steps: Annotated[int, typer.Option("--steps", metavar="NUMBER", help="Steps of each of the two runs.")] = 8,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Prove on this machine that a run which is interrupted equals one that is not, bit for bit."""
    quiet_libraries()
    from sdtrain.commands.verify_resume import verdict_lines
    from sdtrain.commands.verify_resume import verify_resume as run_verify_resume

    verdict = run_verify_resume(config, set_ or [], steps=steps)
    if as_json:
        answer("verify-resume", asdict(verdict) | {"equal": verdict.equal})
    else:
        say(Console(), *verdict_lines(verdict))
    if not verdict.equal:
        raise typer.Exit(1)


configs = typer.Typer(
    help="The recipes that come with sdtrain: list them, or copy one to change it.",
    no_args_is_help=True,
    cls=PlainHelp,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@configs.command("list")
def list_configs(as_json: Json = False) -> None:
    """List the recipes and what each is for; `builtin:NAME` stands for one wherever a CONFIG is asked for."""
    from sdtrain.commands.starting.recipes import described

    if as_json:
        answer("configs", {"configs": described()})
        return
    Console().print(facts_table(described()))
    say(Console(), "copy one and change it: sdtrain configs copy NAME; or as it is: sdtrain fit builtin:quickstart")


@configs.command("copy")
def copy_config(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe, see `sdtrain configs list`.")],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The file or folder to write to; default NAME.toml here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a recipe, to change its paths and whatever else."""
    from sdtrain.commands.starting.recipes import copy_recipe

    target = copy_recipe(name, file, force=force)
    if as_json:
        answer("configs", {"written": [target]})
        return
    say(Console(), f"wrote {target}", f"next: change its paths, then sdtrain check {shell_word(target)}")


def add_training(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    for command in (init, fit, check, view, plan, cache):
        app.command()(command)
    app.command("verify-resume")(verify_resume)
    app.add_typer(configs, name="configs")
