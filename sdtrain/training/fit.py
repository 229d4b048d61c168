"""One training run, from a config to pictures and weights; `train` is the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from optim import ProdigyPlusScheduleFree, averaged
from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.data.examples import Example
from sdtrain.errors import user_error
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.model import Model
from sdtrain.training.export import export_weights, format_of
from sdtrain.training.guard import NonFiniteGuard
from sdtrain.training.objective import Objective
from sdtrain.training.optimizers import build_optimizer, group_records
from sdtrain.training.parameters import Trainable, train_parameters
from sdtrain.training.prepare import Prepared, encode_everything, load
from sdtrain.training.run import Run, open_run, write_resolved_config
from sdtrain.training.signals import stop_requests
from sdtrain.training.states import load_state, save_state, saved_states
from sdtrain.training.watching.grid import save_picture
from sdtrain.training.watching.pace import Pace
from sdtrain.training.watching.preview import preview_grid, render, sampling_settings
from sdtrain.training.watching.records import (
    EndRecord,
    PictureRecord,
    RunRecord,
    SavedRecord,
    StepRecord,
    Watcher,
)
from sdtrain.training.watching.summary import banner, farewell, summary
from sdtrain.training.watching.watchers import Watchers, watching


@dataclass
class Training:
    """Everything that a run holds while it trains."""

    run: Run
    model: Model
    trainable: Trainable
    optimizer: ProdigyPlusScheduleFree
    data: Prepared


def fit(
    config: Config,
    opened: OpenedModel,
    examples: list[Example],
    console: Console,
    *,
    resume: bool = False,
    watchers: Sequence[Watcher] = (),
) -> int:
    """Train what the config says on a model that was opened and pictures that were scanned; return the steps done.

    These are fewer than planned where the run was stopped. watchers: are handed a record of everything that
    happens, see `watching/records.py`.

    Raises UserError for what the user can mend, before anything is changed wherever that can be known.
    """
    started = time.monotonic()
    run = open_run(config)
    model = load(run, opened)
    data = encode_everything(model, run, examples, console)
    trainable = train_parameters(model, run)
    optimizer = build_optimizer(trainable, config)
    write_resolved_config(run)
    training = Training(run, model, trainable, optimizer, data)
    first_step = _resumed_step(training, console) if resume else 0
    console.print(banner(run, trainable, data.batches, first_step))
    with stop_requests() as stop, watching(_record_of(run, first_step), console, watchers) as everybody:
        step = train(training, first_step, everybody, stop)
        everybody.tell(EndRecord(step, "finished" if step == config.steps else "stopped"))
    if step < config.steps:
        console.print(farewell(run, step))
    else:
        console.print(summary(run, optimizer, time.monotonic() - started))
    return step


def train(training: Training, step: int, watchers: Watchers, stop: threading.Event) -> int:
    """Train from `step` steps done to the planned number, or until `stop` is set; return the steps done.

    This is the loop.
    """
    run, optimizer, trainable = training.run, training.optimizer, training.trainable
    config, guard, pace = run.config, NonFiniteGuard(), Pace()
    objective = Objective(training.model, config, run.device)
    if step == 0:
        preview(training, step, watchers)
    while step < config.steps and not stop.is_set():
        pace.begin_step()
        trainable.require_gradients(step)
        losses: list[Tensor] = []
        examples: list[Example] = []
        for batch, share in training.data.batches.at(step):
            with trainable.dropout.drawn(run.generator("dropout", step, batch.index)):
                loss = share * objective(batch, run.generator("noise", step, batch.index))
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            examples += batch.examples
        total = float(sum(losses))
        guard.check(total, examples, step, watchers.tell)
        optimizer.step()  # changes nothing where gradients are not finite
        trainable.limit_norms(optimizer)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        images_per_s = pace.end_step(len(examples))
        watchers.tell(StepRecord(step, total, len(examples), images_per_s, group_records(optimizer)))
        if due(step, config.preview.every, config.steps):
            preview(training, step, watchers)
        if due(step, config.checkpoint.every, config.steps):
            save(training, step, watchers)
    save(training, step, watchers)
    if step == config.steps:
        export(training, step, watchers)
    return step


def due(step: int, every: int, last: int) -> bool:
    """Return whether something that happens at every `every` steps and at the end is due; 0 is never.

    step: the steps that are done. last: the steps that are planned.
    """
    return every > 0 and (step % every == 0 or step == last)


def preview(training: Training, step: int, watchers: Watchers) -> None:
    """Draw the previews with the averaged weights and write them into `previews/`; the training is as it was before."""
    config, prompts = training.run.config, training.data.prompts
    if not prompts.texts or not config.preview.every:
        return
    training.model.move_encoders(training.run.device, text=False)
    with averaged(training.optimizer):
        rows = render(training.model, prompts, config.preview.seeds, sampling_settings(config))
    training.model.move_encoders(torch.device("cpu"), text=False)
    path = training.run.folder / "previews" / f"step-{step:06d}.png"
    save_picture(preview_grid(rows, prompts, config, step, training.run.folder / "previews" / "base.png"), path)
    watchers.tell(PictureRecord(step, path))


def save(training: Training, step: int, watchers: Watchers) -> None:
    """Write the training state after `step` steps into `checkpoints/`, unless it was saved a moment ago."""
    folder = training.run.folder / "checkpoints"
    if step in (state.step for state in saved_states(folder)):
        return
    keep = training.run.config.checkpoint.keep
    path = save_state(folder, step, training.trainable, training.optimizer, keep)
    watchers.tell(SavedRecord(step, path, "state"))


def export(training: Training, step: int, watchers: Watchers) -> None:
    """Write the averaged weights into `weights/`."""
    run, optimizer = training.run, training.optimizer
    with averaged(optimizer):
        export_weights(
            training.model,
            run.config,
            run.weights_path,
            kind=format_of(run.config),
            step=step,
            examples=training.data.examples,
            groups=optimizer.metrics(),
        )
    watchers.tell(SavedRecord(step, run.weights_path, "weights"))


def _resumed_step(training: Training, console: Console) -> int:
    """The steps that are done, with everything as it was then; a d that is estimated again is told of."""
    states = saved_states(training.run.folder / "checkpoints")
    if not states:
        return 0
    if states[-1].step > training.run.config.steps:
        what = f"{training.run.config.steps}, but {states[-1].step} are done; `sdtrain export` writes earlier ones"
        raise user_error(f"--resume {training.run.folder}", "steps", what)
    step = load_state(states[-1], training.trainable, training.optimizer)
    if thawed := training.optimizer.thaw():
        console.print(f"d of {', '.join(thawed)} was frozen and is estimated again from step {step} on")
    return step


def _record_of(run: Run, first_step: int) -> RunRecord:
    config = run.config
    return RunRecord(
        name=config.name,
        folder=run.folder,
        steps=config.steps,
        first_step=first_step,
        d0=config.optimizer.d0,
        config_toml=config_to_toml(config),
    )
