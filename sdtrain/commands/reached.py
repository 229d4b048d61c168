"""What a run has reached: its training states, and the model as it is at one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optim import ProdigyPlusScheduleFree
from sdtrain.config.schema import Config
from sdtrain.errors import user_error
from sdtrain.models.model import Model
from sdtrain.training.keeping.manifest import SavedState, saved_states
from sdtrain.training.keeping.newest import find_newest
from sdtrain.training.keeping.states import load_state
from sdtrain.training.optimizers import build_optimizer
from sdtrain.training.parameters import train_parameters
from sdtrain.training.prepare import open_and_load
from sdtrain.training.run import Run, pick_device, pick_dtype


@dataclass(frozen=True)
class Reached:
    """A run at one of its training states; `averaged(optimizer)` gives the model the weights to look at."""

    run: Run
    model: Model
    optimizer: ProdigyPlusScheduleFree
    step: int


def open_reached(folder: Path, config: Config, step: int | None) -> Reached:
    """Load the model of a run as it is at a training state, None for the newest. Raises UserError."""
    state = find_state(folder, step)
    device = pick_device(config)
    run = Run(folder, config, device, pick_dtype(config, device))
    model = open_and_load(run)
    trainable = train_parameters(model, run)
    optimizer = build_optimizer(trainable, config)
    load_state(state, trainable, optimizer)
    return Reached(run, model, optimizer, state.step)


def find_state(folder: Path, step: int | None) -> SavedState:
    """Return a training state of a run, None for the newest that is whole. Raises UserError, naming those there are."""
    newest = find_newest(folder / "checkpoints").state
    if newest is None:
        raise user_error(str(folder), "checkpoints", "holds no training state; a run saves one when it is stopped")
    states = saved_states(folder / "checkpoints")
    for state in (newest, *states):
        if step in (None, state.step):
            return state
    there = ", ".join(str(state.step) for state in states)
    raise user_error(str(folder), "--step", f"no training state of step {step}; there are {there}")
