"""The command line. Thin: it reads options, calls one function and prints what went wrong.

Nothing heavy is imported at the top, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sdtrain import __version__
from sdtrain.errors import UserError

app = typer.Typer(
    name="sdtrain",
    help="Fine-tune SDXL-style diffusion models. No learning rate, no schedule, no number of steps to choose.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(help="The config, a .toml file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; can be given repeatedly.")
]


@app.command()
def fit(
    config: ConfigPath,
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last training state of this run.")] = False,
) -> None:
    """Train what CONFIG says."""
    from sdtrain.training.start import read_run_config

    settings = read_run_config(config, set_ or [], resume=resume)
    quiet_libraries()
    from sdtrain.training.fit import fit as run_fit

    if not run_fit(settings, Console(), resume=resume):
        raise typer.Exit(130)


@app.command()
def check(config: ConfigPath, set_: Overrides = None) -> None:
    """Find every mistake in CONFIG, its model and its pictures, without training."""
    from sdtrain.training.check import check_config

    check_config(config, set_ or [], Console())


@app.command()
def sample(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_WEIGHTS", help="A run folder or a weights file.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to show; can be given repeatedly.")],
    seed: Annotated[list[int] | None, typer.Option("--seed", help="One picture each; default 0, 1, 2, 3.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the pictures; default RUN/samples.")] = None,
    set_: Overrides = None,
) -> None:
    """Make pictures with the averaged weights of a run."""
    quiet_libraries()
    from sdtrain.training.sample import sample as run_sample

    run_sample(source, prompt, seed or [0, 1, 2, 3], out, set_ or [], Console())


def quiet_libraries() -> None:
    """Keep advice meant for programmers out of the user's terminal; errors still come through."""
    import os

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def show_version(wanted: bool) -> None:
    """`--version`."""
    if wanted:
        typer.echo(f"sdtrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point: what the user can mend is told in plain words, with exit code 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(error.text(), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
