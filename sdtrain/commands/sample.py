"""`sdtrain sample`: draws pictures with a finished run or a weights file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from PIL import Image
from rich.console import Console

from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.merge import merge_into
from sdtrain.commands.libraries import quiet_libraries
from sdtrain.config.read import resolve
from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.errors import user_error
from sdtrain.families.metadata import CONFIG_KEY, steps_of
from sdtrain.files.header import read_header
from sdtrain.models.model import Model
from sdtrain.training.prepare import open_and_load
from sdtrain.training.run import Run, pick_device, pick_dtype
from sdtrain.training.start import stored_config
from sdtrain.training.watching.grid import labelled_grid, save_picture
from sdtrain.training.watching.preview import prepare_prompts, render, sampling_settings

SEEDS = (0, 1, 2, 3)
"""The seeds of the pictures where none are named."""


@dataclass(frozen=True)
class Pictures:
    """Pictures that were drawn, and the weights that they show."""

    rows: list[list[Image.Image]]
    """One row per prompt, one column per seed."""
    title: str
    """The name of the run, and the step of its weights."""


def sample(
    source: Path | str,
    prompts: Sequence[str] | str,
    seeds: Sequence[int] = SEEDS,
    *,
    overrides: Sequence[str] = (),
) -> list[list[Image.Image]]:
    """Draw prompts x seeds with the averaged weights of a run; return one row per prompt, with one column per seed.

    Nothing is written. A seed means the same noise for every prompt, and the same as in the previews of a run.

    Args:
        source: a finished run's folder, or a weights file that sdtrain wrote.
        prompts: what to show.
        seeds: one picture per seed and prompt.
        overrides: settings to change, each as `key=value`, for example `preview.guidance_scale=4.0`.

    Raises:
        UserError: the run is not finished, or the file is not one of sdtrain's.
    """
    quiet_libraries()
    texts = [prompts] if isinstance(prompts, str) else prompts
    return draw(Path(source), texts, seeds, overrides).rows


def sample_to_files(
    source: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path | None,
    overrides: Sequence[str],
    console: Console,
) -> None:
    """Draw prompts x seeds with the averaged weights in `source`; write one file per picture, and a labelled grid."""
    drawn = draw(source, prompts, seeds, overrides)
    folder = out or (source if source.is_dir() else source.parent) / "samples"
    for index, pictures in enumerate(drawn.rows):
        for seed, picture in zip(seeds, pictures, strict=True):
            save_picture(picture, folder / f"prompt-{index:02d}-seed-{seed}.png")
    save_picture(labelled_grid(drawn.rows, prompts, seeds, drawn.title), folder / "grid.png")
    console.print(
        f"{len(prompts) * len(seeds)} pictures in {folder}; all of them: {folder / 'grid.png'}", soft_wrap=True
    )


def draw(source: Path, prompts: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> Pictures:
    """Draw pictures with the averaged weights in `source`, a run's folder or a weights file. Raises UserError."""
    weights = _weights_file(source)
    metadata = read_header(weights).metadata
    config = _config(metadata, weights, prompts, overrides)
    device = pick_device(config)
    run = Run(weights.parent, config, device, pick_dtype(config, device))
    model = load_with_weights(run, weights)
    model.move_encoders(device, text=True)
    rows = render(model, prepare_prompts(model, config, trains_text=False), seeds, sampling_settings(config))
    return Pictures(rows, f"{config.name}, step {steps_of(metadata) or '?'}")


def _weights_file(source: Path) -> Path:
    if not source.is_dir():
        return source
    config = stored_config(source)
    weights = source / "weights" / f"{config.name}.safetensors"
    if not weights.exists():
        raise user_error(
            str(source), "weights", f"this run is not finished; go on: sdtrain fit {source / 'config.toml'} --resume"
        )
    return weights


def _config(metadata: Mapping[str, str], path: Path, prompts: Sequence[str], overrides: Sequence[str]) -> Config:
    if CONFIG_KEY not in metadata:
        raise user_error(str(path), "metadata", "was not written by sdtrain, so its base model is not known")
    table = tomllib.loads(metadata[CONFIG_KEY])
    table["preview"] = {**table["preview"], "prompts": list(prompts)}
    return resolve(table, str(path), overrides)


def load_with_weights(run: Run, weights: Path) -> Model:
    """Return the model of a run with the weights of a file in its layers. Raises UserError."""
    method = run.config.method
    match method:
        case LoraConfig():
            model = open_and_load(run)
            merge_into(model.networks, [(read_lora(weights, model.networks).adapters, 1.0)])
            return model
        case FullConfig():
            own = {"path": str(weights), "components": run.config.model.components or run.config.model.path, "vae": ""}
            config = run.config.model_copy(update={"model": run.config.model.model_copy(update=own)})
            return open_and_load(replace(run, config=config))
        case _:
            assert_never(method)
