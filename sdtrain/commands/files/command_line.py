"""`sdtrain merge` as the command line has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from sdtrain.adapters.shares import Share, share_of
from sdtrain.commands.front.answers import answer
from sdtrain.commands.front.command_line import Json
from sdtrain.commands.libraries import quiet_libraries
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.training.watching.progress import ProgressLines
from sdtrain.training.watching.text import facts_table, say

Layout = Literal["single-file", "folder"]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def merge(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="The base model: a file, a folder, a hub id or builtin:NAME; or a LoRA, with --base."
        ),
    ],
    files: Annotated[list[Path], typer.Argument(metavar="LORA...", help="LoRA files.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.", show_default=False)],
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="WEIGHT",
            help="Of each LoRA in turn; default 1. Of networks and blocks, too: 0.8,text_encoder=0.5,down_blocks.*=0",
        ),
    ] = None,
    layout: Annotated[Layout, typer.Option("--layout", help="What to write.")] = "single-file",
    model: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="LoRAs into one LoRA: a model that they fit.")
    ] = "",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="NUMBER", min=1, help="Of a LoRA made of LoRAs, the highest; default: nothing is lost."
        ),
    ] = None,
    energy: Annotated[
        float,
        typer.Option(
            "--energy", metavar="SHARE", min=0.0, max=1.0, help="Keep the fewest ranks that hold this share of each dW."
        ),
    ] = 1.0,
    components: Annotated[
        str,
        typer.Option(
            "--components",
            metavar="FOLDER",
            help="Folder with configs and tokenizers, which a single file lacks; see model.components.",
        ),
    ] = "",
    partial: Annotated[
        bool, typer.Option("--partial", help="Use the layers of a LoRA that fit, and say which were left out.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Put LoRAs into a base model, or several LoRAs into one; weights may differ by network and block."""
    quiet_libraries()
    from sdtrain.commands.files.merge import is_adapter_file
    from sdtrain.commands.files.merge import merge as run_merge

    console = Console(quiet=as_json)
    into_lora = is_adapter_file(base)
    named = [Path(base), *files] if into_lora else files
    pairs = list(zip(named, _shares(weight, len(named)), strict=True))
    if into_lora:
        if not model:
            what = f"is missing: {base} is a LoRA, and its sum with others needs the names of a model that they fit"
            raise user_error("merge", "--base", what)
        from sdtrain.commands.files.sums import merge_loras

        with ProgressLines(console) as progress:
            done = merge_loras(
                pairs, model, out, rank, energy, components, partial=partial, force=force, show=progress.show
            )
        found = f"{done.changed} layers, which miss {done.error:.2%} of the sum of the changes |dW|"
    else:
        if model or rank is not None or energy != 1:
            what = f"are for LoRAs into one LoRA; {base} is a model, whose weights have no rank; leave them out"
            raise user_error("merge", "--base, --rank and --energy", what)
        with ProgressLines(console) as progress:
            done = run_merge(base, pairs, out, layout, components, partial=partial, force=force, show=progress.show)
        found = f"{done.changed} layers of {base} changed"
    if as_json:
        left_out = [problem.where for problem in done.left_out]
        answer("merge", {"written": [out], "layers": done.changed, "hash": done.hash, "left_out": left_out})
        return
    hashed = [f"hash {done.hash}"] if done.hash else []
    say(console, *left_out_lines(done.left_out), f"wrote {out}: {found}", *hashed)


def compared_as_files(paths: Sequence[Path], base: str, drawing: Sequence[object], *, as_json: bool = False) -> bool:
    """Show what tells two weight files apart, where that is what was named; return whether it was.

    drawing: options that say how pictures of runs are drawn. Raises UserError for more or fewer files than two.
    """
    if not any(path.suffix == ".safetensors" for path in paths):
        if base:
            raise user_error("compare", "--base", "is for two LoRA files; the base of a run is known")
        return False
    if len(paths) != 2 or any(path.suffix != ".safetensors" for path in paths):
        raise user_error("compare", "RUN...", "names weight files: give just two .safetensors files, or runs alone")
    if any(drawing):
        raise user_error("compare", "options", "say how runs are drawn, which two files are not; leave them out")
    quiet_libraries()
    from sdtrain.commands.files.difference import compare_files

    found = compare_files(paths[0], paths[1], base)
    if as_json:
        answer("compare", {"facts": found})
    else:
        Console().print(facts_table(found))
    return True


def _shares(texts: Sequence[str] | None, num_files: int) -> list[Share]:
    """Return the weights of each file. Raises UserError with all that is wrong with them."""
    if not texts:
        return [Share()] * num_files
    problems, shares = [], []
    if len(texts) != num_files:
        problems.append(Problem("--weight", f"given {len(texts)} times for {num_files} files; give one for each"))
    for text in texts:
        try:
            shares.append(share_of(text))
        except ValueError as error:
            problems.append(Problem("--weight", str(error)))
    if problems:
        raise UserError("merge", problems)
    return shares


def left_out_lines(problems: Sequence[Problem]) -> list[str]:
    """Return a line for each layer of a file that was left out."""
    return [f"left out: {problem.where} {problem.what}" for problem in problems]


def add_file_commands(app: typer.Typer) -> None:
    """Add the commands of this chapter to the command line."""
    app.command()(merge)
