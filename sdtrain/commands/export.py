"""`sdtrain export`: writes the averaged weights of a run in another format, or those of an earlier step."""

from __future__ import annotations

from pathlib import Path

from optim import averaged
from sdtrain.config.schema import Config
from sdtrain.data.examples import scan_folders
from sdtrain.errors import user_error
from sdtrain.training.export import Format, export_weights
from sdtrain.training.keeping.manifest import SavedState, saved_states
from sdtrain.training.keeping.newest import find_newest
from sdtrain.training.keeping.states import load_state
from sdtrain.training.optimizers import build_optimizer
from sdtrain.training.parameters import train_parameters
from sdtrain.training.prepare import open_and_load
from sdtrain.training.run import Run, pick_device, pick_dtype
from sdtrain.training.start import stored_config


def export_run(folder: Path, kind: Format, step: int | None, out: Path | None) -> Path:
    """Write the averaged weights of a run's training state in a format; return the path. Raises UserError.

    step: which state, None for the newest that is whole. out: where to write, None for the run's `weights/`.
    """
    config = stored_config(folder)
    state = _state(folder, step)
    device = pick_device(config)
    run = Run(folder, config, device, pick_dtype(config, device))
    model = open_and_load(run)
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
    newest = find_newest(folder / "checkpoints").state
    if newest is None:
        raise user_error(str(folder), "checkpoints", "holds no training state to export from")
    for state in (newest, *states):
        if step in (None, state.step):
            return state
    there = ", ".join(str(state.step) for state in states)
    raise user_error(str(folder), "--step", f"no training state of step {step}; there are {there}")


def _file_name(config: Config, step: int, kind: Format) -> str:
    name = f"{config.name}-{kind}-step-{step:06d}"
    return name if kind == "folder" else f"{name}.safetensors"
