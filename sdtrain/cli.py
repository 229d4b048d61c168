"""The command line. Thin: it reads options, calls one function and prints what went wrong.

Nothing heavy is imported at the top, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from sdtrain.commands.files.command_line import Force, add_file_commands, compared_as_files, left_out_lines
from sdtrain.commands.front.answers import answer, refusal, wants_answer
from sdtrain.commands.front.command_line import GroupedHelp, Json, add_commands
from sdtrain.commands.front.drawing import may_be_packed, sample
from sdtrain.commands.front.options import Overrides, Step
from sdtrain.commands.front.training import add_training
from sdtrain.commands.libraries import end_process, importing_less, process_is_ours, quiet_libraries, versions
from sdtrain.commands.publish.command_line import add_publish_commands
from sdtrain.errors import UserError, user_error
from sdtrain.training.watching.text import hand_out, say

app = typer.Typer(
    name="sdtrain",
    help="Fine-tune SDXL-style diffusion models. No learning rate, no schedule, no number of steps to choose.",
    no_args_is_help=True,
    cls=GroupedHelp,
    context_settings={"max_content_width": 160},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ExportFormat = Literal["sd-scripts", "diffusers", "single-file", "folder"]
Form = Literal["auto", "native", "lora", "diff"]
StoredType = Literal["auto", "float32", "float16", "bfloat16"]
MOST_STRENGTH = 1000
BaseModel = Annotated[
    str, typer.Argument(metavar="BASE", help="The base model: a file, a folder, a hub id or builtin:NAME.")
]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.", show_default=False)]
Rank = Annotated[int, typer.Option("--rank", metavar="NUMBER", min=1, help="The highest rank a layer may get.")]
Energy = Annotated[
    float,
    typer.Option(
        "--energy", metavar="SHARE", min=0.0, max=1.0, help="Keep the fewest ranks that hold this share of each dW."
    ),
]
ComponentsFolder = Annotated[
    str,
    typer.Option(
        "--components",
        metavar="FOLDER",
        help="Folder with configs and tokenizers, which a single file lacks; see model.components.",
    ),
]
Partial = Annotated[
    bool, typer.Option("--partial", help="Use the layers of a LoRA that fit, and say which were left out.")
]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    format_: Annotated[ExportFormat, typer.Option("--format", help="What to write.")],
    step: Step = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="File or folder; default in RUN/weights.")
    ] = None,
    form: Annotated[Form | None, typer.Option("--form", help="See export.form; default as the run says.")] = None,
    strength: Annotated[
        float, typer.Option("--strength", metavar="NUMBER", help="How often the change counts, in the file.")
    ] = 1.0,
    dtype: Annotated[StoredType | None, typer.Option("--dtype", help="See export.dtype.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the averaged weights of a run in another format, or of an earlier step."""
    quiet_libraries()
    with importing_less(quantised=may_be_packed(run, [])):
        from sdtrain.commands.files.export import ExportOptions, export_run

    if not abs(strength) < MOST_STRENGTH or strength == 0:
        raise user_error("export", "--strength", f"{strength:g} is no strength; use a number such as 0.8")
    done = export_run(run, format_, step, out, ExportOptions(form, dtype, strength, force))
    notes = [done.note] if done.note else []
    if as_json:
        answer("export", {"written": [done.path], "notes": notes})
    else:
        say(Console(), f"wrote {done.path}", *(f"note: {note}" for note in notes))


@app.command()
def extract(
    base: BaseModel,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model that was made of it.")],
    out: OutFile,
    rank: Rank = 16,
    energy: Energy = 1.0,
    targets: Annotated[
        str, typer.Option("--targets", metavar="TARGETS", help="A preset of method.targets, or a pattern.")
    ] = "all-linear",
    components: ComponentsFolder = "",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a LoRA of the difference of two models."""
    quiet_libraries()
    from sdtrain.adapters.low_rank import RankRule
    from sdtrain.commands.files.extract import extract_lora

    layers = extract_lora(base, tuned, RankRule(rank, energy), targets, out, components, force=force)
    if as_json:
        answer("extract", {"written": [out], "layers": layers})
    else:
        say(Console(), f"wrote {out}: {layers} layers")


@app.command()
def resize(
    file: Annotated[Path, typer.Argument(metavar="LORA", help="A LoRA file.")],
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="A model it fits.")],
    out: OutFile,
    rank: Rank = 16,
    energy: Energy = 1.0,
    components: ComponentsFolder = "",
    partial: Partial = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Give a LoRA another rank."""
    quiet_libraries()
    from sdtrain.adapters.low_rank import RankRule
    from sdtrain.commands.files.extract import resize_lora

    read = resize_lora(file, base, RankRule(rank, energy), out, components, partial=partial, force=force)
    if as_json:
        answer("resize", {"written": [out], "left_out": [problem.where for problem in read.left_out]})
    else:
        say(Console(), *left_out_lines(read.left_out), f"wrote {out}")


@app.command(name="import-kohya")
def import_kohya(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Configs of sd-scripts or kohya_ss.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The config to write; default: it is printed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a config of ours of FILEs of kohya, TOML or JSON, with a comment on every option."""
    from sdtrain.commands.import_kohya import import_kohya as run_import
    from sdtrain.commands.import_kohya import imported_answer, summary

    imported = run_import(files, out)
    if as_json:
        answer("import-kohya", imported_answer(imported, out))
    elif out is None:
        hand_out(imported.text)
        say(Console(stderr=True), summary(imported))
    else:
        say(Console(), f"wrote {out}: {summary(imported)}")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE_OR_RUN", help="A .safetensors file or a run folder.")],
    step: Step = None,
    as_json: Json = False,
) -> None:
    """What is in a file (kind, ranks, base, steps, d per network, tags), or how far a run is."""
    from sdtrain.commands.files.info import file_answer, file_info, run_info, run_info_answer

    is_run = file.is_dir() or step is not None
    if as_json:
        answer("info", run_info_answer(file, step) if is_run else file_answer(file))
    elif is_run:
        Console().print(run_info(file, step))
    else:
        Console().print(file_info(file))


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="A folder of runs; default runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs: how they stand, how far they are, how large, and how to go on."""
    from sdtrain.commands.runs import list_runs, run_answer

    found = list_runs(folder, Console(quiet=as_json))
    if as_json:
        answer("runs", {"runs": [run_answer(facts) for facts in found]})


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    as_json: Json = False,
) -> None:
    """Write the report.html of runs anew, from their logs and previews."""
    from sdtrain.commands.pages.report import write_report

    written = []
    for folder in run:
        written.append(write_report(folder))
        say(Console(quiet=as_json), f"wrote {written[-1]}")
    if as_json:
        answer("report", {"written": written})


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run folder, or several; or two .safetensors files.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="What to show, repeatedly; default the run's previews."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", metavar="NUMBER", help="Repeatedly; default the previews' seeds.")
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option("--strength", metavar="NUMBER", help="Repeatedly; 0 is the base. Default 0, 0.5, 1."),
    ] = None,
    step: Annotated[
        list[int] | None,
        typer.Option("--step", metavar="NUMBER", help="Training states, repeatedly; default those that are there."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Folder of the files; default RUN/compare.")
    ] = None,
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="Of two LoRA files: a model they fit.")] = "",
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Draw steps of a run, or several runs, side by side at several strengths; or tell two weight files apart."""
    if compared_as_files(runs, base, [prompt, seed, strength, step, out, set_], as_json=as_json):
        return
    quiet_libraries()
    with importing_less(quantised=any(may_be_packed(run, set_ or []) for run in runs)):
        from sdtrain.commands.pages.compare import STRENGTHS, compare_to_files

    wanted = prompt or [], seed or [], strength or STRENGTHS, step or []
    written = compare_to_files(runs, *wanted, out, set_ or [], Console(quiet=as_json))
    if as_json:
        answer("compare", {"written": written})


add_training(app)
app.command()(sample)
add_commands(app)
add_file_commands(app)
add_publish_commands(app)


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


def command() -> NoReturn:
    """Entry point of a process that does nothing else: `main`, and a quick end."""
    code = 0
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        code = ended.code or 0
    end_process(code)


def main() -> None:
    """The command line: what the user can mend is told in plain words, with the error's exit code."""
    process_is_ours()
    try:
        app()
    except UserError as error:
        if wants_answer(sys.argv[1:]):
            with contextlib.suppress(OSError):
                answer(sys.argv[1], refusal(error))
        with contextlib.suppress(OSError):  # the terminal may be gone
            say(Console(stderr=True), *error.text().split("\n"))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
