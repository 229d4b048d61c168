"""What can be done with files after a run: export, merge, extract, resize, and a look inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast, get_args

import torch

from optim import averaged
from sdtrain.adapters.formats.lora_file import LoraFile, read_lora, write_lora
from sdtrain.adapters.formats.metadata import CONFIG_KEY, FileFacts
from sdtrain.adapters.kinds import Adapters
from sdtrain.adapters.low_rank import RankRule, extract
from sdtrain.adapters.merge import merge_into
from sdtrain.adapters.resize import resize
from sdtrain.adapters.targets import TargetPreset, select_targets
from sdtrain.config.schema import Config, ModelConfig
from sdtrain.data.examples import scan_folders
from sdtrain.errors import UserError, user_error
from sdtrain.families.modelspec import Description
from sdtrain.models.checkpoints.inspect import inspect_model
from sdtrain.models.load import load_model
from sdtrain.models.model import Layout, Model
from sdtrain.training.export import Format, export_weights
from sdtrain.training.optimizers import build_optimizer
from sdtrain.training.parameters import train_parameters
from sdtrain.training.prepare import load
from sdtrain.training.run import Run, pick_device, pick_dtype
from sdtrain.training.start import stored_config
from sdtrain.training.states import SavedState, load_state, saved_states

CPU = torch.device("cpu")


def export_run(folder: Path, kind: Format, step: int | None, out: Path | None) -> Path:
    """Write the averaged weights of a run's training state in a format; returns where. Raises UserError."""
    config = stored_config(folder)
    state = _state(folder, step)
    device = pick_device(config)
    run = Run(folder, config, device, pick_dtype(config, device))
    model = load(run)
    trainable = train_parameters(model, run)
    optimizer = build_optimizer(trainable, config)
    load_state(state, trainable, optimizer)
    examples, _ = scan_folders(config.data, decode=False)  # for the tag counts; pictures may be gone by now
    target = out or folder / "weights" / _file_name(config, state.step, kind)
    with averaged(optimizer):
        export_weights(model, config, target, kind=kind, step=state.step, examples=examples, groups=optimizer.metrics())
    return target


def _state(folder: Path, step: int | None) -> SavedState:
    states = saved_states(folder / "checkpoints")
    if not states:
        raise user_error(str(folder), "checkpoints", "holds no training state to export from")
    for state in states:
        if state.step == step or (step is None and state is states[-1]):
            return state
    there = ", ".join(str(state.step) for state in states)
    raise user_error(str(folder), "--step", f"no training state of step {step}; there are {there}")


def _file_name(config: Config, step: int, kind: Format) -> str:
    name = f"{config.name}-{kind}-step-{step:06d}"
    return name if kind == "folder" else f"{name}.safetensors"


def open_model(path: str, components: str = "") -> Model:
    """A model on the CPU, its networks in float32. Raises UserError."""
    config = ModelConfig(path=path, components=components)
    _, problems = inspect_model(config)
    if problems:
        raise UserError(path, problems)
    return load_model(config, device=CPU, dtype=torch.float32)


def merge(base: str, files: Sequence[tuple[Path, float]], out: Path, layout: Layout, components: str = "") -> int:
    """Write `base` with adapter files merged in, each times its weight; how many layers changed. Raises UserError."""
    model = open_model(base, components)
    adapters = [(read_lora(path, model.networks).adapters, weight) for path, weight in files]
    changed = merge_into(model.networks, adapters)
    model.write_checkpoint(out, Description(title=out.stem, resolution_px=1024), layout=layout)
    return changed


def extract_lora(base: str, tuned: str, rule: RankRule, targets: str, out: Path, components: str = "") -> int:
    """Write the LoRA that makes `tuned` of `base`, as near as its rank allows; how many layers it has."""
    before, after = open_model(base, components), open_model(tuned, components)
    meant = cast(TargetPreset, targets) if targets in get_args(TargetPreset) else [targets]
    modules = select_targets(before.networks, meant, unused=before.unused_layers)
    adapters = extract(before.networks, after.networks, rule, modules=modules)
    if not any(adapters.values()):
        raise user_error(tuned, "weights", f"are those of {base} in every layer of --targets {targets}")
    _write(out, adapters, before, base, {})
    return sum(map(len, adapters.values()))


def resize_lora(file: Path, base: str, rule: RankRule, out: Path, components: str = "") -> LoraFile:
    """Write a LoRA file with another rank, as near as that allows; what was read. Raises UserError."""
    model = open_model(base, components)
    read = read_lora(file, model.networks)
    _write(out, resize(read.adapters, rule), model, base, read.metadata)
    return read


def _write(out: Path, adapters: Adapters, model: Model, base: str, said: Mapping[str, str]) -> None:
    facts = FileFacts(
        title=out.stem,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        prediction=model.prediction,
        base_model=Path(base).name,
        config_toml=said.get(CONFIG_KEY, ""),
    )
    write_lora(out, adapters, model.networks, names="sd-scripts", facts=facts)
