"""Pictures from a finished run or from a weights file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from rich.console import Console

from sdtrain.adapters.files import read_header
from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.merge import merge_into
from sdtrain.config.read import override_table, resolve
from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.errors import user_error
from sdtrain.models.model import Model
from sdtrain.training.export import CONFIG_KEY, STEP_KEY
from sdtrain.training.prepare import open_and_load
from sdtrain.training.run import Run, pick_device, pick_dtype
from sdtrain.training.start import stored_config
from sdtrain.training.watching.preview import labelled_grid, prepare_prompts, render, sampling_settings, save_picture


def sample(
    source: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path | None,
    overrides: Sequence[str],
    console: Console,
) -> None:
    """Render prompts x seeds with the averaged weights in `source`, one file a picture and a labelled grid."""
    weights = _weights_file(source)
    metadata = read_header(weights).metadata
    config = _config(metadata, weights, prompts, overrides)
    device = pick_device(config)
    run = Run(weights.parent, config, device, pick_dtype(config, device))
    model = load_with_weights(run, weights)
    model.move_encoders(device, text=True)
    rows = render(model, prepare_prompts(model, config, trains_text=False), seeds, sampling_settings(config))
    folder = out or (source if source.is_dir() else weights.parent) / "samples"
    for index, pictures in enumerate(rows):
        for seed, picture in zip(seeds, pictures, strict=True):
            save_picture(picture, folder / f"prompt-{index:02d}-seed-{seed}.png")
    step = metadata.get(STEP_KEY) or metadata.get("ss_steps", "?")
    grid = labelled_grid(rows, prompts, seeds, f"{config.name}, step {step}")
    save_picture(grid, folder / "grid.png")
    console.print(
        f"{len(prompts) * len(seeds)} pictures in {folder}; all of them: {folder / 'grid.png'}", soft_wrap=True
    )


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
    override_table(table, overrides)
    table["preview"] = {**table["preview"], "prompts": list(prompts)}
    return resolve(table, str(path))


def load_with_weights(run: Run, weights: Path) -> Model:
    """The model of a run with the weights of a file in its layers. Raises UserError."""
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
