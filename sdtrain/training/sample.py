"""Pictures from a finished run or from a weights file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdtrain.adapters.lora import LoraWeights
from sdtrain.config.read import override_table, resolve
from sdtrain.config.schema import Config, LoraConfig
from sdtrain.errors import user_error
from sdtrain.models.model import Model
from sdtrain.training.prepare import load
from sdtrain.training.preview import labelled_grid, prepare_prompts, render, sampling_settings, save_picture
from sdtrain.training.run import Run, pick_device, pick_dtype
from sdtrain.training.start import stored_config


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
    tensors, metadata = read_tensors(weights)
    config = _config(weights, metadata, prompts, overrides)
    device = pick_device(config)
    run = Run(weights.parent, config, device, pick_dtype(config, device))
    model = load(run)
    put_on(model, config, tensors, weights)
    model.move_encoders(device, text=True)
    rows = render(model, prepare_prompts(model, config, trains_text=False), seeds, sampling_settings(config))
    folder = out or (source if source.is_dir() else weights.parent) / "samples"
    for index, pictures in enumerate(rows):
        for seed, picture in zip(seeds, pictures, strict=True):
            save_picture(picture, folder / f"prompt-{index:02d}-seed-{seed}.png")
    grid = labelled_grid(rows, prompts, seeds, f"{config.name}, step {metadata.get('sdtrain.step', '?')}")
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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises UserError when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise user_error(str(path), "file", "no such file; name a run folder or a .safetensors file") from None
    except SafetensorError as error:
        raise user_error(str(path), "file", f"is not a whole safetensors file: {error}") from None


def _config(path: Path, metadata: dict[str, str], prompts: Sequence[str], overrides: Sequence[str]) -> Config:
    if "sdtrain.config" not in metadata:
        raise user_error(str(path), "metadata", "was not written by sdtrain, so its base model is not known")
    table = tomllib.loads(metadata["sdtrain.config"])
    override_table(table, overrides)
    table["preview"] = {**table["preview"], "prompts": list(prompts)}
    return resolve(table, str(path))


def put_on(model: Model, config: Config, tensors: dict[str, Tensor], path: Path) -> None:
    """Give the networks the weights of a file, adapters merged into the layers they sit on."""
    if isinstance(config.method, LoraConfig):
        _merge(model, tensors)
        return
    for name in config.method.train:
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        model.networks[name].load_state_dict(own)


@torch.no_grad()
def _merge(model: Model, tensors: dict[str, Tensor]) -> None:
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            weights = LoraWeights(down, tensors[f"{name}.lora_B.weight"], alpha=down.shape[0])
            network, _, module = name.partition(".")
            layer = model.networks[network].get_submodule(module)
            layer.weight.add_(weights.delta().to(layer.weight))
