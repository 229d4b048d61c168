"""`sdtrain sample` as the command line has it: its options are settings of the previews, seeds and files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sdtrain.commands.front.answers import answer
from sdtrain.commands.front.command_line import Json
from sdtrain.commands.front.options import Overrides, Step
from sdtrain.commands.libraries import importing_less, quiet_libraries
from sdtrain.config.paths import toml_string
from sdtrain.diffusion.words import Sampler
from sdtrain.errors import Problem, UserError
from sdtrain.families.metadata import CONFIG_KEY
from sdtrain.files.header import read_header
from sdtrain.training.keeping.stored import settings_path

LEAST_SIDE_PX = 16
_SIZE = re.compile(r"(\d{1,5})(?:[xX](\d{1,5}))?")


def sample(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_WEIGHTS", help="A run folder or a weights file.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to show; can be given repeatedly.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file", metavar="FILE", help="Prompts, one a line; empty lines and # lines do not count."
        ),
    ] = None,
    negative: Annotated[
        str | None, typer.Option("--negative", metavar="TEXT", help="What not to show.", show_default=False)
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", metavar="NUMBER", help="One picture each; default 0, 1, 2, 3.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--count", metavar="NUMBER", min=1, help="Pictures of a prompt, of seeds from --seed or 0 on."),
    ] = None,
    size: Annotated[
        str, typer.Option("--size", metavar="WIDTHxHEIGHT", help="In pixels, such as 832x1216, or 1024.")
    ] = "",
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="NUMBER", min=1, help="Sampling steps; default as in previews.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", metavar="NUMBER", min=1.0, help="See preview.guidance_scale.")
    ] = None,
    guidance_rescale: Annotated[
        float | None,
        typer.Option(
            "--guidance-rescale",
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="See preview.guidance_rescale.",
            show_default=False,
        ),
    ] = None,
    sampler: Annotated[Sampler | None, typer.Option("--sampler", help="See preview.sampler.")] = None,
    lora: Annotated[
        list[Path] | None, typer.Option("--lora", metavar="FILE", help="Another LoRA on top; can be given repeatedly.")
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", metavar="NUMBER", help="Of each --lora in turn; default 1.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Use the layers of a --lora that fit, and say which were left out.")
    ] = False,
    strength: Annotated[
        float, typer.Option("--strength", metavar="NUMBER", help="How much of what was trained counts; 0 is the base.")
    ] = 1.0,
    base: Annotated[
        str,
        typer.Option("--base", metavar="MODEL", help="Of a weights file: the model it is for, if it does not say so."),
    ] = "",
    step: Step = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Folder for the pictures; default RUN/samples.")
    ] = None,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Make pictures with the averaged weights of a run, finished or not."""
    problems: list[Problem] = []
    prompts = [*(prompt or []), *(_lines_of(prompt_file, problems) if prompt_file else [])]
    if not prompts and not problems:
        problems.append(Problem("--prompt", "is missing: say what to show, or name a --prompt-file"))
    loras = _weighted(lora or [], weight or [], problems)
    seeds = _seeds(seed or [], count, problems)
    given = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "guidance_rescale": guidance_rescale,
        "sampler": sampler,
        "negative_prompt": None if negative is None else toml_string(negative),
        **_sides(size, problems),
    }
    if problems:
        raise UserError("sample", problems)
    overrides = [*(set_ or []), *(f"preview.{key}={value}" for key, value in given.items() if value is not None)]
    quiet_libraries()
    with importing_less(quantised=may_be_packed(source, overrides)):
        from sdtrain.commands.sample import SEEDS, sample_to_files

    written = sample_to_files(
        *(source, prompts, seeds or SEEDS, out, overrides, Console(quiet=as_json)),
        step=step,
        loras=loras,
        partial=partial,
        strength=strength,
        base=base,
    )
    if as_json:
        answer("sample", {"written": written})


def may_be_packed(source: Path, overrides: Sequence[str]) -> bool:
    """Return whether a model's base may be quantised, as far as a glance tells."""
    if any("base_precision" in one for one in overrides):
        return True
    try:
        settings = (
            settings_path(source).read_text("utf-8") if source.is_dir() else read_header(source).metadata[CONFIG_KEY]
        )
    except (OSError, ValueError, KeyError, UserError):  # which is told where the settings are read for good
        return True
    return 'base_precision = "full"' not in settings


def _lines_of(file: Path, problems: list[Problem]) -> list[str]:
    """Return the prompts in a file; what is wrong with it is added to the problems."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, ValueError) as error:  # ValueError: it is no text in UTF-8, or no path
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        problems.append(Problem("--prompt-file", f"{file} cannot be read: {reason}"))
        return []
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        problems.append(Problem("--prompt-file", f"{file} holds no prompt; write one on each line"))
    return prompts


def _weighted(files: Sequence[Path], weights: Sequence[float], problems: list[Problem]) -> list[tuple[Path, float]]:
    if weights and len(weights) != len(files):
        what = f"given {len(weights)} times for {len(files)} of --lora; give one for each"
        problems.append(Problem("--weight", what))
        return []
    return list(zip(files, weights or [1.0] * len(files), strict=True))


def _seeds(seeds: Sequence[int], count: int | None, problems: list[Problem]) -> list[int]:
    """Return the seeds that were asked for; none where nothing was said."""
    if count is None:
        return list(seeds)
    if len(seeds) > 1:
        problems.append(
            Problem("--count", f"counts on from one --seed, but there are {len(seeds)}; leave one of both out")
        )
    first = seeds[0] if seeds else 0
    return list(range(first, first + count))


def _sides(size: str, problems: list[Problem]) -> dict[str, int]:
    if not size:
        return {}
    found = _SIZE.fullmatch(size.strip())
    if found is None or min(int(side) for side in found.groups() if side) < LEAST_SIDE_PX:
        problems.append(Problem("--size", f"{size!r} is no size in pixels; write 832x1216, or 1024 for a square"))
        return {}
    return {"width_px": int(found[1]), "height_px": int(found[2] or found[1])}
