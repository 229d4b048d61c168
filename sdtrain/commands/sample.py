"""`sdtrain sample`: draws pictures with a run, finished or not, or with a weights file."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, assert_never

import torch
from PIL import Image
from rich.console import Console

from optim import averaged
from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.loading.beside import put_beside
from sdtrain.adapters.merge import merge_into
from sdtrain.commands.files.command_line import left_out_lines
from sdtrain.commands.libraries import quiet_libraries
from sdtrain.commands.reached import Reached, open_reached
from sdtrain.commands.run_facts import finished_weights
from sdtrain.commands.starting.foreign import foreign_table
from sdtrain.config.paths import read_toml, toml_string
from sdtrain.config.read import resolve
from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.metadata import CONFIG_KEY, steps_of
from sdtrain.files.header import read_header
from sdtrain.files.progress import Progress, unseen
from sdtrain.files.writer import require_place
from sdtrain.models.model import Model
from sdtrain.training.export import trained_adapters
from sdtrain.training.prepare import open_and_load
from sdtrain.training.run import Run, autocast, pick_device, pick_dtype
from sdtrain.training.start import drawing, stored_config
from sdtrain.training.watching.grid import DrawnFrom, labelled_grid, save_picture
from sdtrain.training.watching.preview import (
    PICTURES_AT_ONCE,
    drawn_from,
    prepare_prompts,
    render,
    sampling_settings,
)
from sdtrain.training.watching.progress import ProgressLines
from sdtrain.training.watching.text import say

Loras: TypeAlias = Sequence[tuple[Path, float]]
"""Files of LoRAs, each with its weight."""
SEEDS = (0, 1, 2, 3)
"""The seeds of the pictures where none are named."""


@dataclass(frozen=True)
class Pictures:
    """Pictures that were drawn, and the weights that they show."""

    rows: list[list[Image.Image]]
    """One row per prompt, one column per seed."""
    title: str
    """The name of the run, and the step of its weights."""
    drawn_from: DrawnFrom
    left_out: tuple[Problem, ...]
    """What of LoRAs on top could not be used."""


def sample(
    source: Path | str,
    prompts: Sequence[str] | str,
    seeds: Sequence[int] = SEEDS,
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
) -> list[list[Image.Image]]:
    """Draw prompts x seeds with the averaged weights of a run; return one row per prompt, with one column per seed.

    Nothing is written. A seed means the same noise for every prompt, and the same as in the previews of a run.

    Args:
        source: a run's folder, or a weights file that sdtrain wrote.
        prompts: what to show.
        seeds: one picture per seed and prompt.
        step: which training state of a run to draw with; None: its weights if it is finished, else the newest state.
        overrides: settings to change, each as `key=value`, for example `preview.guidance_scale=4.0`.

    Raises:
        UserError: the run has no such state, or the file is not one of sdtrain's.
    """
    quiet_libraries()
    texts = [prompts] if isinstance(prompts, str) else prompts
    return draw(Path(source), texts, seeds, step, overrides).rows


def sample_to_files(
    source: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path | None,
    overrides: Sequence[str],
    console: Console,
    *,
    step: int | None = None,
    loras: Loras = (),
    partial: bool = False,
    strength: float = 1.0,
    base: str = "",
) -> list[Path]:
    """Draw prompts x seeds with the averaged weights in `source`; write one file per picture, and a labelled grid.

    Return the paths of all of them, the grid last. Raises UserError, see `draw`.

    loras: files of LoRAs that are added to the weights, each times its weight. partial: whether layers of them that
    cannot be used are left out.
    """
    folder = out or (source if source.is_dir() else source.parent) / "samples"
    require_place(folder, folder=True)
    with ProgressLines(console) as progress:
        drawn = draw(
            *(source, prompts, seeds, step, overrides, loras),
            partial=partial,
            strength=strength,
            base=base,
            on_progress=progress.show,
        )
    written = []
    for index, pictures in enumerate(drawn.rows):
        for seed, picture in zip(seeds, pictures, strict=True):
            written.append(folder / f"prompt-{index:02d}-seed-{seed}.png")
            save_picture(picture, written[-1], drawn.drawn_from.one(prompts[index], seed).words())
    grid = labelled_grid(drawn.rows, prompts, seeds, drawn.title)
    save_picture(grid, folder / "grid.png", drawn.drawn_from.words())
    num = len(prompts) * len(seeds)
    say(
        console,
        *left_out_lines(drawn.left_out),
        f"{num} pictures of {drawn.title} in {folder}; all of them: {folder / 'grid.png'}",
    )
    return [*written, folder / "grid.png"]


def draw(
    source: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    step: int | None,
    overrides: Sequence[str],
    loras: Loras = (),
    *,
    partial: bool = False,
    strength: float = 1.0,
    base: str = "",
    on_progress: Progress = unseen,
) -> Pictures:
    """Draw pictures with the averaged weights in `source`, a run's folder or a weights file. Raises UserError.

    on_progress: called with what is done, how far it is and how far it goes. strength: how much of what was trained
    counts. base: the model that a weights file belongs to, where it does not say so, or another one. loras, partial:
    see `sample_to_files`.
    """
    if base and source.is_dir():
        raise user_error("sample", "--base", "is for a weights file; the base model of a run is known: leave it out")
    if not source.is_dir():
        if step is not None:
            raise user_error(str(source), "--step", "belongs to a run; a weights file holds one step")
        config = _config(source, prompts, overrides, base)
        with _naming_base(config):
            return _draw_file(source, config, seeds, loras, on_progress, partial=partial, strength=strength)
    weights = finished_weights(source) if step is None else None
    if weights is not None:
        config = _config(weights, prompts, overrides)
        return _draw_file(weights, config, seeds, loras, on_progress, partial=partial, strength=strength)
    config = stored_config(source, overrides, prompts=prompts)
    reached = open_reached(source, config, step)
    with averaged(reached.optimizer):
        model = reached.model if strength == 1 else _weakened(reached, strength)
        left_out = _add(model, loras, partial=partial)
        rows = _render(model, reached.run, seeds, on_progress)
    told = _told(config, reached.step, seeds, loras, strength)
    return Pictures(rows, f"{config.name}, step {reached.step}", told, left_out)


@contextmanager
def _naming_base(config: Config) -> Iterator[None]:
    """Say of a file that lacks tokenizers or configs which option of `sample` names those of another model."""
    try:
        yield
    except UserError as error:
        if config.model.components or not any(problem.where == "model.components" for problem in error.problems):
            raise
        hint = Problem("--base", "names a model to take them from, a diffusers folder, a hub id or builtin:NAME")
        raise UserError(error.source, [*error.problems, hint]) from error


def _draw_file(
    weights: Path,
    config: Config,
    seeds: Sequence[int],
    loras: Loras,
    on_progress: Progress,
    *,
    partial: bool,
    strength: float,
) -> Pictures:
    device = pick_device(config)
    run = Run(weights.parent, config, device, pick_dtype(config, device))
    model = load_with_weights(run, weights, strength)
    left_out = _add(model, loras, partial=partial)
    rows = _render(model, run, seeds, on_progress)
    step = steps_of(read_header(weights).metadata) or None
    title = f"{config.name}, step {step}" if step else config.name
    return Pictures(rows, title, _told(config, step, seeds, loras, strength), left_out)


def _told(config: Config, step: int | None, seeds: Sequence[int], loras: Loras, strength: float) -> DrawnFrom:
    """Return what pictures were drawn from; what was trained stands among the LoRAs where it does not count in full."""
    own = [(Path(config.name), strength)] if strength != 1 else []
    return replace(drawn_from(config, step, [*own, *loras]), seeds=tuple(seeds))


def _weakened(reached: Reached, strength: float) -> Model:
    """Return the base model with the adapters of a state, which are counted so much. Raises UserError for others."""
    if not isinstance(reached.run.config.method, LoraConfig):
        raise _without_strength()
    adapters = copy.deepcopy(trained_adapters(reached.model, reached.run.config))
    model = open_and_load(reached.run)
    merge_into(model.networks, [(adapters, strength)])
    return model


def _without_strength() -> UserError:
    what = "is for adapters; what a full fine-tune is at several strengths, `sdtrain compare RUN` draws"
    return user_error("sample", "--strength", what)


def _add(model: Model, loras: Loras, *, partial: bool) -> tuple[Problem, ...]:
    """Add LoRAs to the weights of a model; return what of them was left out.

    Raises UserError, naming the file, for one that does not fit.
    """
    files = [(read_lora(file, model.networks, partial=partial), weight) for file, weight in loras]
    merge_into(model.networks, [(file.adapters, weight) for file, weight in files])
    return tuple(problem for file, _ in files for problem in file.left_out)


def _render(model: Model, run: Run, seeds: Sequence[int], on_progress: Progress) -> list[list[Image.Image]]:
    model.move_encoders(run.device, text=True)
    prompts = prepare_prompts(model, run.config, trains_text=False)
    model.move_encoders(torch.device("cpu"), text=True)  # the U-Net need not fit beside them
    model.place()
    model.move_encoders(run.device, text=False)
    settings, num = sampling_settings(run.config), len(prompts.texts) * len(seeds)
    total = -(-num // PICTURES_AT_ONCE) * settings.num_inference_steps + num  # each picture is decoded, too
    done = itertools.count(1)

    def count() -> None:
        on_progress("drawing", min(next(done), total), total)

    return render(model, prompts, seeds, settings, count, lambda: autocast(run.config, run.device))


def _config(path: Path, prompts: Sequence[str], overrides: Sequence[str], base: str = "") -> Config:
    """Return the settings in the header of a file, or those of a file of other tools. Raises UserError."""
    metadata = read_header(path).metadata
    if CONFIG_KEY not in metadata:
        return resolve(drawing(foreign_table(path, base), prompts), str(path), overrides)
    if base:
        overrides = [*overrides, f"model.path={toml_string(base)}"]
    try:
        table = read_toml(metadata[CONFIG_KEY])
    except ValueError as error:
        raise user_error(str(path), CONFIG_KEY, f"in the header is no config ({error}); fetch the file again") from None
    return resolve(drawing(table, prompts), str(path), overrides)


def load_with_weights(run: Run, weights: Path, strength: float = 1.0) -> Model:
    """Return the model of a run with the weights of a file in its layers. Raises UserError.

    strength: how much they count; of a whole model they cannot but count in full.
    """
    method = run.config.method
    match method:
        case LoraConfig():
            model = open_and_load(run)
            adapters = read_lora(weights, model.networks).adapters
            if strength != 1 or not put_beside(model.networks, adapters):
                merge_into(model.networks, [(adapters, strength)])
            return model
        case FullConfig() if strength != 1:
            raise _without_strength()
        case FullConfig():
            base = run.config.model
            beside = base.components or ("" if base.path.endswith(".safetensors") else base.path)
            own = {"path": str(weights), "components": beside, "vae": ""}
            config = run.config.model_copy(update={"model": run.config.model.model_copy(update=own)})
            return open_and_load(replace(run, config=config))
        case _:
            assert_never(method)
