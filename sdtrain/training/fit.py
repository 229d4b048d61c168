"""One training run, from a config to pictures and weights; `train` is the loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.errors import NotFiniteError
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.computing.graphs import Graphs, uses_graphs
from sdtrain.training.computing.objective import Objective
from sdtrain.training.ending.guard import backward
from sdtrain.training.ending.memory import Room, explained_while
from sdtrain.training.ending.rescue import kept_on_errors
from sdtrain.training.ending.scaling import LossScale
from sdtrain.training.ending.settling import Settling
from sdtrain.training.ending.signals import StopRequests
from sdtrain.training.keeping.policy import remove_superfluous
from sdtrain.training.keeping.room import require_room
from sdtrain.training.keeping.standing import Standing, clear_the_way
from sdtrain.training.keeping.states import Background, load_state
from sdtrain.training.optimizers import build_optimizer
from sdtrain.training.outputs import (
    checkpoint,
    export,
    export_along,
    finish_saving,
    leave,
    newest_text,
    preview,
    save,
    validate,
)
from sdtrain.training.parameters import train_parameters
from sdtrain.training.planning.budget import Expected
from sdtrain.training.prepare import encode_a_share, encode_everything, load
from sdtrain.training.ranks.group import ALONE, Ranks, ToldElsewhereError
from sdtrain.training.run import Run, computes_in_float16, notes_on, open_run, write_resolved_config
from sdtrain.training.training import Training
from sdtrain.training.validating.validator import Validator
from sdtrain.training.watching.records import EndRecord, NoteRecord, RunRecord, Watcher
from sdtrain.training.watching.report.about import NOTHING, Told
from sdtrain.training.watching.report.begin import report_writer
from sdtrain.training.watching.summary import banner, summary
from sdtrain.training.watching.text import say
from sdtrain.training.watching.tracking.watcher import trackers
from sdtrain.training.watching.watchers import Watchers, watching


def fit(
    config: Config,
    opened: OpenedModel,
    standing: Standing,
    console: Console,
    stop: StopRequests,
    *,
    watchers: Sequence[Watcher] = (),
    ranks: Ranks = ALONE,
    told: Told = NOTHING,
    expected: Expected | None = None,
    result: Console | None = None,
) -> tuple[int, bool]:
    """Train what the config says on a model that was opened, from where the run stands.

    Returns the steps done, and whether the run is finished: all planned steps are done, or as many as its validation
    found enough. watchers: are handed a record of everything that happens, see `watching/records.py`. stop: asked
    between two steps. ranks: the processes that train the run together; the first one writes and speaks.
    told: what the user was told of the pictures, which the report repeats. expected: what the run will need. result:
    where it is told what came of it; None: on the console too.

    Raises UserError for what the user can mend, before anything is changed wherever that can be known. Whatever is
    raised after the first step, what was reached is saved before, and told.
    """
    started = time.monotonic()
    training = prepare(config, opened, standing, console, stop, ranks)
    first_step = training.step
    planned = expected.line() if expected else ""
    run, data, d_coef = training.run, training.data, float(training.optimizer.param_groups[0]["d_coef"])
    console.print(banner(run, training.trainable, data.batches, first_step, data.examples, d_coef, planned))
    stop.finish_first(lambda: f"{training.doing}, saving", lambda: newest_text(training))
    report = report_writer(training.run, standing, told)
    others = [report.see, *trackers(config.tracking), *watchers]
    said: list[str] = []
    record = _record_of(training.run, first_step, d_coef)
    try:
        with (
            watching(record, console, others, somebody_else=not ranks.is_first) as everybody,
            kept_on_errors(lambda error: said.extend(leave(training, everybody, error)), training.explain),
            ranks.together(),
        ):
            train(training, everybody, stop)
            if not training.is_finished:
                said.extend(leave(training, everybody, stop.name))
            everybody.tell(EndRecord(training.step, "finished" if training.is_finished else "stopped"))
            ranks.wait_for_the_first()
    except NotFiniteError as error:  # on all ranks in the same step
        ranks.wait_for_the_first()
        if not ranks.is_first:
            raise ToldElsewhereError(error.exit_code) from error
        raise
    finally:
        training.data.close()
        say(result or console, *said)
    if training.is_finished:
        best, seconds = training.validator.history.best, time.monotonic() - started
        memory = expected.judged(training.run.device) if expected else ""
        (result or console).print(summary(training.run, training.optimizer, training.step, seconds, best, memory))
    return training.step, training.is_finished


def prepare(
    config: Config, opened: OpenedModel, standing: Standing, console: Console, stop: StopRequests, ranks: Ranks
) -> Training:
    """Return everything that a run trains with, as it is before the first step. Raises UserError."""
    run = open_run(config, ranks)
    uses_graphs(run)  # or says why it cannot, before anything is loaded
    if ranks.is_first:
        say(console, *notes_on(config, run.device))
    with explained_while(lambda: stop.doing, run):
        stop.doing = "loading the model"
        model = load(run, opened)
        stop.doing = "encoding the pictures and captions"
        if ranks.are_several:
            encode_a_share(model, run, standing, console)
        with ranks.first_alone():  # the others find everything in the cache
            data = encode_everything(model, run, standing, console)
        stop.doing = "preparing the first step"
        stop.leave_if_asked()
        trainable = train_parameters(model, run)
        optimizer = build_optimizer(trainable, config)
    with ranks.first_alone():
        if ranks.is_first:
            require_room(run.folder, config, opened, trainable, standing.step)
            say(console, *standing.notes, *clear_the_way(standing, run.folder))
    background = Background(config_to_toml(config), standing.register_text(), standing.plan, standing.base)
    validator = Validator(data.held_out, run.folder / "checkpoints", config.validation.patience)
    scale = LossScale(is_used=computes_in_float16(config, run.device))
    if config.memory.fused_back_pass:
        scale.unscale_within(trainable.parameters())
    training = Training(run, model, trainable, optimizer, data, background, validator, scale)
    _go_on_from(standing, training, console)
    write_resolved_config(run)
    return training


def train(training: Training, watchers: Watchers, stop: StopRequests) -> None:
    """Train until all steps are done, the validation is enough, or `stop` is asked for. This is the loop."""
    run, optimizer, trainable = training.run, training.optimizer, training.trainable
    config, ranks = run.config, run.ranks
    room = Room(training.model, config, optimizer, training.make_room, ranks)
    settling = Settling(training, watchers)
    objective = Objective(training.model, config, run.device, training.data.preservation)

    def told(text: str) -> None:
        settling.settle()
        watchers.tell(NoteRecord(training.step, f"step {training.step + 1}: {text}"))

    if uses_graphs(run):
        training.graphs = Graphs(objective, trainable.parameters(), told)
    if training.step == 0:
        preview(training, watchers, stop)
    if due(training.step, config.validation.every, config.steps) and training.validator.lacks(training.step):
        validate(training, objective, watchers, stop)  # which was given up when the run was stopped
    while not training.all_agree_to_end(stop):
        training.doing = f"finishing step {training.step + 1}"
        settling.begin()
        trainable.require_gradients(training.step)
        loss = room.enough_for(lambda: gradients(training, objective, room.batch_size), told)
        if not config.memory.fused_back_pass:
            training.scale.unscale(trainable.parameters())
        settling.settle()  # the step before: what it came to is there by now
        loss = ranks.add_up(trainable.parameters(), loss)
        optimizer.step()  # changes nothing where gradients are not finite
        trainable.limit_norms(optimizer)
        training.step += 1
        settling.take(loss)
        optimizer.zero_grad(set_to_none=True)
        if training.behind.is_done and not training.is_sharded:  # they learn of it together
            finish_saving(training, watchers)
        if looks(training):
            settling.settle()
        if due(training.step, config.preview.every, config.steps):
            preview(training, watchers, stop)
        if due(training.step, config.validation.every, config.steps):
            validate(training, objective, watchers, stop)
        if due(training.step, config.checkpoint.every, config.steps) or training.state_is_owed:
            checkpoint(training, watchers)
        if due(training.step, config.export.every, config.steps):
            export_along(training, watchers)
    settling.settle()
    if training.is_finished:
        save(training, watchers)
        export(training, watchers, run.weights_path)


def looks(training: Training) -> bool:
    """Return whether something is done after this step that must know what it came to."""
    config = training.run.config
    cadences = config.preview.every, config.validation.every, config.checkpoint.every, config.export.every
    return training.state_is_owed or any(due(training.step, every, config.steps) for every in cadences)


def gradients(training: Training, objective: Objective, batch_size: int) -> Tensor:
    """Add up this process's gradients of the coming step; return its share of the loss, ().

    batch_size: the most pictures that are computed at once.
    """
    run, place = training.run, training.run.ranks.place
    total = torch.zeros((), device=run.device)
    batches, in_step = training.data.batches, training.is_sharded
    for batch, share in batches.at(training.step, batch_size, hand=place.rank, hands=place.size, in_step=in_step):
        noise = partial(run.generator, "noise", training.step)
        if training.graphs is not None:
            total += training.graphs.add(batch, noise, share, training.scale.value)
            continue
        with training.trainable.dropout.drawn(partial(run.generator, "dropout", training.step), batch.rows):
            loss = share * objective(batch, noise)
            backward(loss, training.scale.value)
        total += loss.detach()
    return total


def due(step: int, every: int, last: int) -> bool:
    """Return whether something that happens at every `every` steps and at the end is due; 0 is never.

    step: the steps that are done. last: the steps that are planned.
    """
    return every > 0 and (step % every == 0 or step == last)


def _go_on_from(standing: Standing, training: Training, console: Console) -> None:
    """Put everything back as it was in the state that a run goes on from; a d that is estimated again is told of."""
    if standing.state is None:
        return
    # a run that is made longer goes on in the steps of a long run; one that is made shorter, in those it began with
    own = training.run.config.optimizer.d_coef != "auto"
    training.step = load_state(standing.state, training.trainable, training.optimizer, own_d_coef=own)
    training.saved_step = training.step
    with contextlib.suppress(OSError):  # which a kill may have kept the last save from
        remove_superfluous(standing.state.folder.parent, training.step, training.run.config.checkpoint)
    training.is_sound = standing.state.loss_was_finite
    training.scale.go_on_from(standing.state.loss_scale)
    training.validator.go_on_from(training.step)
    if thawed := training.optimizer.thaw():
        say(console, f"d of {', '.join(thawed)} was frozen and is estimated again from step {training.step} on")


def _record_of(run: Run, first_step: int, d_coef: float) -> RunRecord:
    config = run.config
    return RunRecord(
        name=config.name,
        folder=run.folder,
        steps=config.steps,
        first_step=first_step,
        d0=config.optimizer.d0,
        config_toml=config_to_toml(config),
        usual_weight=d_coef if config.optimizer.d_coef == "auto" else 1.0,
    )
