"""The command line. Thin: it reads options, calls one function and prints what went wrong.

Nothing heavy is imported at the top, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from sdtrain.commands.libraries import quiet_libraries, versions
from sdtrain.errors import Interrupted, UserError, user_error
from sdtrain.training.watching.text import say

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
ExportFormat = Literal["sd-scripts", "diffusers", "single-file", "folder"]
CheckpointLayout = Literal["single-file", "folder"]
BaseModel = Annotated[str, typer.Argument(help="The base model: a file, a folder, a hub id or builtin:NAME.")]
OutFile = Annotated[Path, typer.Option("--out", help="The file to write.", show_default=False)]
Rank = Annotated[int, typer.Option("--rank", min=1, help="The highest rank a layer may get.")]
Step = Annotated[int | None, typer.Option("--step", help="Which training state of a run; default the newest.")]
Energy = Annotated[
    float, typer.Option("--energy", min=0.0, max=1.0, help="Keep the fewest ranks that hold this share of each dW.")
]
ComponentsFolder = Annotated[str, typer.Option("--components", help="See model.components.")]


@app.command()
def fit(
    config: ConfigPath,
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last training state of this run.")] = False,
    accept_data: Annotated[
        bool, typer.Option("--accept-data", help="With --resume: go on with pictures that have changed since.")
    ] = False,
    resume_or_start: Annotated[
        bool,
        typer.Option(
            "--resume-or-start",
            help="Go on if this run was begun, start if not, and do nothing if it is finished: for job scripts.",
        ),
    ] = False,
) -> None:
    """Train what CONFIG says.

    Exit codes: 0 done; 2 something to mend first; 4 losses or gradients stayed not finite; 1 another error, with what
    was reached saved; 130, 143, 129, 138 stopped by Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, with what was reached saved.
    """
    from sdtrain.commands.fit import fit_config

    try:
        how: Literal["auto"] | bool = "auto" if resume_or_start else resume
        code = fit_config(config, set_ or [], Console(), resume=how, accept_data=accept_data).exit_code
    except Interrupted as stopped:  # which was told when it came
        code = stopped.exit_code
    raise typer.Exit(code)


@app.command()
def check(config: ConfigPath, set_: Overrides = None) -> None:
    """Find every mistake in CONFIG, its model and its pictures, without training."""
    from sdtrain.commands.check import check_config

    check_config(config, set_ or [], Console())


@app.command()
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
    from sdtrain.commands.plan import plan_config

    plan_config(config, set_ or [], Console(), budget=fit_to)


@app.command()
def sample(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_WEIGHTS", help="A run folder or a weights file.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to show; can be given repeatedly.")],
    seed: Annotated[list[int] | None, typer.Option("--seed", help="One picture each; default 0, 1, 2, 3.")] = None,
    step: Step = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the pictures; default RUN/samples.")] = None,
    guidance_rescale: Annotated[
        float | None,
        typer.Option("--guidance-rescale", min=0.0, max=1.0, help="See preview.guidance_rescale.", show_default=False),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Make pictures with the averaged weights of a run, finished or not."""
    overrides = list(set_ or [])
    if guidance_rescale is not None:
        overrides.append(f"preview.guidance_rescale={guidance_rescale}")
    quiet_libraries()
    from sdtrain.commands.sample import SEEDS, sample_to_files

    sample_to_files(source, prompt, seed or SEEDS, out, overrides, Console(), step=step)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    format_: Annotated[ExportFormat, typer.Option("--format", help="What to write.")],
    step: Step = None,
    out: Annotated[Path | None, typer.Option("--out", help="File or folder; default in RUN/weights.")] = None,
) -> None:
    """Write the averaged weights of a run in another format, or of an earlier step."""
    quiet_libraries()
    from sdtrain.commands.files.export import export_run

    say(Console(), f"wrote {export_run(run, format_, step, out)}")


@app.command()
def merge(
    base: BaseModel,
    files: Annotated[list[Path], typer.Argument(metavar="LORA...", help="LoRA files.")],
    out: OutFile,
    weight: Annotated[list[float] | None, typer.Option("--weight", help="Of each LoRA in turn; default 1.")] = None,
    layout: Annotated[CheckpointLayout, typer.Option("--layout", help="What to write.")] = "single-file",
    components: ComponentsFolder = "",
) -> None:
    """Put LoRAs into a base model."""
    weights = weight or [1.0] * len(files)
    if len(weights) != len(files):
        raise user_error("merge", "--weight", f"given {len(weights)} times for {len(files)} files; give one for each")
    quiet_libraries()
    from sdtrain.commands.files.merge import merge as run_merge

    changed = run_merge(base, list(zip(files, weights, strict=True)), out, layout, components)
    say(Console(), f"wrote {out}: {changed} layers of {base} changed")


@app.command()
def extract(
    base: BaseModel,
    tuned: Annotated[str, typer.Argument(help="The model that was made of it.")],
    out: OutFile,
    rank: Rank = 16,
    energy: Energy = 1.0,
    targets: Annotated[str, typer.Option("--targets", help="A preset of method.targets, or a pattern.")] = "all-linear",
    components: ComponentsFolder = "",
) -> None:
    """Make a LoRA of the difference of two models."""
    quiet_libraries()
    from sdtrain.adapters.low_rank import RankRule
    from sdtrain.commands.files.extract import extract_lora

    layers = extract_lora(base, tuned, RankRule(rank, energy), targets, out, components)
    say(Console(), f"wrote {out}: {layers} layers")


@app.command()
def resize(
    file: Annotated[Path, typer.Argument(help="A LoRA file.")],
    base: Annotated[str, typer.Option("--base", help="A model it fits.")],
    out: OutFile,
    rank: Rank = 16,
    energy: Energy = 1.0,
    components: ComponentsFolder = "",
) -> None:
    """Give a LoRA another rank."""
    quiet_libraries()
    from sdtrain.adapters.low_rank import RankRule
    from sdtrain.commands.files.extract import resize_lora

    resize_lora(file, base, RankRule(rank, energy), out, components)
    say(Console(), f"wrote {out}")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE_OR_RUN", help="A .safetensors file or a run folder.")],
    step: Step = None,
) -> None:
    """What is in a file (kind, ranks, base, steps, d per network, tags), or how far a run is."""
    from sdtrain.commands.files.info import file_info, run_info

    if file.is_dir() or step is not None:
        Console().print(run_info(file, step))
    else:
        Console().print(file_info(file))


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="A folder of runs; default runs.")] = Path("runs"),
) -> None:
    """List runs: how they stand, how far they are, how large, and how to go on."""
    from sdtrain.commands.runs import list_runs

    list_runs(folder, Console())


@app.command("verify-resume")
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


def show_version(wanted: bool) -> None:
    """`--version`: of sdtrain and of what it stands on, without importing any of it."""
    if wanted:
        say(Console(), *versions())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show versions."),
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point: what the user can mend is told in plain words, with the error's exit code."""
    try:
        app()
    except UserError as error:
        with contextlib.suppress(OSError):  # the terminal may be gone
            say(Console(stderr=True), *error.text().split("\n"))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
