"""What a run writes on its way: previews, training states and averaged weights."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from optim import ProdigyPlusScheduleFree, averaged
from sdtrain.errors import NotFiniteError, UserError
from sdtrain.models.model import Model
from sdtrain.models.tiles import TOLD
from sdtrain.training.computing.graphs import Graphs
from sdtrain.training.computing.objective import Objective
from sdtrain.training.ending.memory import explained, is_out_of_memory, release
from sdtrain.training.ending.rescue import Saving, keep, sentence
from sdtrain.training.ending.scaling import LossScale
from sdtrain.training.ending.signals import GivenUpError, StopRequests
from sdtrain.training.export import export_files
from sdtrain.training.keeping.manifest import SavedState, saved_states
from sdtrain.training.keeping.states import Background, UnusableNumbersError, save_state
from sdtrain.training.parameters import Trainable
from sdtrain.training.prepare import Prepared
from sdtrain.training.run import Run, autocast
from sdtrain.training.validating.validator import Validator
from sdtrain.training.watching.grid import save_picture
from sdtrain.training.watching.preview import drawn_from, preview_grid, render, sampling_settings
from sdtrain.training.watching.records import NoteRecord, PictureRecord, SavedRecord
from sdtrain.training.watching.summary import farewell
from sdtrain.training.watching.watchers import Watchers
from sdtrain.training.weights_files import NATIVE

TRY_AGAIN_STEPS = 25
"""After how many steps a training state that could not be written is tried again."""


@dataclass
class Training:
    """Everything that a run holds while it trains."""

    run: Run
    model: Model
    trainable: Trainable
    optimizer: ProdigyPlusScheduleFree
    data: Prepared
    background: Background
    validator: Validator
    scale: LossScale
    uses_graphs: bool = False
    step: int = 0
    """The number of steps that are done."""
    saved_step: int | None = None
    """The step whose state is on disk as it is in memory."""
    is_sound: bool = True
    """Whether the last step was taken: its loss and gradients were finite."""
    state_is_owed: bool = False
    """Whether a training state is due that could not be saved yet."""
    doing: str = "starting"
    """What is done now, for the person who stops it."""
    try_again_at: int = 0
    """The step before which saving is not tried again, after it failed."""
    settle: Callable[[], None] = field(default=lambda: None)
    """Tells of the last step, where that was not done yet; for those who end a run."""
    graphs: Graphs | None = None
    """What launches the gradients of a micro-batch at once, on a card where that pays."""
    first_is_finished: bool = False
    """Whether the ranks agreed that the run is finished; the first one alone validates."""

    def all_agree_to_end(self, stop: StopRequests) -> bool:
        """Return whether the run ends here, finished or stopped: the same on all ranks, whoever was asked to stop."""
        number, self.first_is_finished = self.run.ranks.agree(stop.number, self.is_finished)
        if number:
            stop.ask(number)
        return bool(number) or self.first_is_finished

    def make_room(self) -> None:
        """Free what is kept on the card from step to step only to be faster."""
        if self.graphs is not None:
            self.graphs.forget()

    @property
    def is_finished(self) -> bool:
        """Whether all planned steps are done, or as many as the validation found enough."""
        return self.first_is_finished or self.step >= self.run.config.steps or self.validator.is_enough

    def explain(self, error: Exception) -> UserError | None:
        """Return what a person is told instead of an error, where more can be said than the error does."""
        if not is_out_of_memory(error):
            return None
        return explained(self.model, self.run, self.trainable, self.step + 1)


def preview(training: Training, watchers: Watchers, stop: StopRequests) -> None:
    """Draw the previews with the averaged weights and write them into `previews/`; the training is as it was before.

    They are given up when the run is asked to end, and left out where they fail.
    """
    step, config, prompts = training.step, training.run.config, training.data.prompts
    if not training.run.ranks.is_first or not prompts.texts or not config.preview.every or stop.asked:
        return
    training.doing = f"giving up the preview of step {step}"
    folder = training.run.folder / "previews"
    path = folder / f"step-{step:06d}.png"
    whole = "decoded" not in training.model.tiled
    training.make_room()
    try:
        with _vae_on(training.run.device, training.model), averaged(training.optimizer):
            settings, seeds = sampling_settings(config), config.preview.seeds
            computing = partial(autocast, config, training.run.device)
            rows = render(training.model, prompts, seeds, settings, stop.give_up, computing)
        grid = preview_grid(rows, prompts, config, step, folder / "base.png")
        save_picture(grid, path, drawn_from(config, step).words())
    except GivenUpError:
        return
    except Exception as error:  # noqa: BLE001 - who only looks must not end the run, which could lose hours
        release(error)
        watchers.tell(NoteRecord(step, f"note: no preview of step {step}: {sentence(error)}; the training goes on"))
        return
    if whole and "decoded" in training.model.tiled:
        watchers.tell(NoteRecord(step, f"note: {TOLD['decoded']}"))
    watchers.tell(PictureRecord(step, path))


@contextmanager
def _vae_on(device: torch.device, model: Model) -> Iterator[None]:
    model.move_encoders(device, text=False)
    try:
        yield
    finally:
        model.move_encoders(torch.device("cpu"), text=False)


def checkpoint(training: Training, watchers: Watchers) -> None:
    """Save the training state, or owe it: where the disk refuses it, and while steps are left out.

    A state of steps that were left out is not worth the place of one before them. Either way the run goes on, for to
    end it would lose what is in memory only.
    """
    if not training.run.ranks.is_first:
        return
    training.state_is_owed = True
    if not training.is_sound or training.step < training.try_again_at:
        return
    try:
        save(training, watchers)
        training.state_is_owed = False
    except (UserError, OSError, MemoryError) as error:
        release(error)
        training.try_again_at = training.step + TRY_AGAIN_STEPS
        watchers.tell(
            NoteRecord(
                training.step,
                f"note: the training state of step {training.step} could not be saved: {sentence(error)}; the training "
                f"goes on, and it is tried again at step {training.try_again_at}",
            )
        )


def save(training: Training, watchers: Watchers, *, keep_all: bool = False) -> None:
    """Write the training state into `checkpoints/`, unless it was saved a moment ago.

    keep_all: whether no older state makes room for it. Numbers that are not finite are not worth a state: the ones that
    are there stay, which is told.
    """
    training.doing = f"finishing step {training.step}"
    step = training.step
    if step == training.saved_step or not training.run.ranks.is_first:
        return
    watchers.keep_log()
    try:
        path = save_state(
            training.run.folder / "checkpoints",
            step,
            training.trainable,
            training.optimizer,
            training.background,
            training.run.config.checkpoint,
            loss_is_finite=training.is_sound,
            loss_scale=training.scale.state,
            keep_all=keep_all,
        )
    except UnusableNumbersError as error:
        watchers.tell(NoteRecord(step, f"step {step} is not saved: {error}; the states of before stay as they are"))
        return
    training.saved_step = step
    watchers.tell(SavedRecord(step, path, "state"))
    if not training.is_sound:
        text = f"step {step} was saved while losses or gradients were not finite: no good state went for it"
        watchers.tell(NoteRecord(step, text))


def validate(training: Training, objective: Objective, watchers: Watchers, stop: StopRequests) -> None:
    """Measure the loss on held-out pictures with the averaged weights, each rank on its share.

    The training is as it was before. Where the loss is the lowest so far the weights are written, and the state of the
    training where states are kept at all. It comes last, so that a run which goes on from it has the weights. All is
    given up when the run is asked to end. What fails is no reason to end the training.
    """
    step, ranks, validator = training.step, training.run.ranks, training.validator
    if validator.held_out is None:
        return
    training.doing = f"giving up the validation of step {step}"
    training.make_room()
    mine, failure = None, ""
    try:
        mine = validator.measure(objective, training.optimizer, lambda: stop.asked, ranks.place)
    except Exception as error:  # noqa: BLE001 - who only looks must not end the run, which could lose hours
        release(error)
        failure = sentence(error)
    losses, any_failed = ranks.merge(validator.pictures, mine, failed=bool(failure))
    if not ranks.is_first:
        return
    try:
        if losses is not None and validator.take(losses, step, watchers.tell):
            export(training, watchers, training.run.best_weights_path)
            if training.run.config.checkpoint.every:
                save(training, watchers)
    except Exception as error:  # noqa: BLE001 - nor must who keeps what it found
        release(error)
        failure = sentence(error)
    if any_failed or failure:
        text = f"note: the validation of step {step} failed: {failure or 'on another process'}; the training goes on"
        watchers.tell(NoteRecord(step, text))


def export(training: Training, watchers: Watchers, path: Path) -> None:
    """Write the averaged weights to `path`."""
    run, optimizer, step = training.run, training.optimizer, training.step
    if not run.ranks.is_first:
        return
    with averaged(optimizer):
        written = export_files(
            training.model,
            run.config,
            path,
            step=step,
            examples=training.data.examples,
            groups=optimizer.metrics(),
            folder=run.folder,
        )
    for file in written:
        watchers.tell(SavedRecord(step, file.path, "weights"))
        if file.note:
            watchers.tell(NoteRecord(step, f"note: {file.note}"))


def leave(training: Training, watchers: Watchers, cause: str | Exception) -> list[str]:
    """Save what a run has reached that ends early; return what its user is told, a line each.

    cause: the error that ends it, or the name of the signal.
    """
    training.settle()
    if not training.run.ranks.is_first:
        return []
    failed = isinstance(cause, Exception)
    saving = Saving(
        state=lambda: save(training, watchers, keep_all=failed),
        weights=lambda: _export_early(training, watchers),
        newest=lambda: _newest(training),
    )
    kept = keep(saving, training.optimizer)
    before = [state.folder for state in _states(training) if state.step < training.step]
    if isinstance(cause, NotFiniteError) and before and kept.state is not None:
        kept = replace(
            kept, problems=(*kept.problems, f"to go on from before, delete {kept.state}: {before[-1]} is next")
        )
    return farewell(training.run, training.step, "an error" if failed else str(cause), kept)


def _export_early(training: Training, watchers: Watchers) -> Path | None:
    """Write the averaged weights under a name that tells the step; as many of these stay as training states."""
    if training.step == 0:
        return None
    run = training.run
    path = run.weights_path.with_name(f"{run.config.name}-step-{training.step:06d}.safetensors")
    export(training, watchers, path)
    settings = run.config
    _keep_newest(
        path.parent, settings.name, settings.export.keep if settings.export.every else settings.checkpoint.keep
    )
    return path


def _keep_newest(folder: Path, run: str, number: int) -> None:
    name = re.compile(re.escape(run) + r"-step-\d+\.safetensors")
    early = sorted(file for file in folder.iterdir() if name.fullmatch(file.name))
    for file in early[:-number]:
        for one in (file, file.with_name(f"{file.stem}{NATIVE}{file.suffix}")):
            one.unlink(missing_ok=True)


def export_along(training: Training, watchers: Watchers) -> None:
    """Write the averaged weights of the way, as many of which stay as `export.keep` says.

    Where that fails it is told, and the training goes on: they can be had from a training state, too.
    """
    if training.is_finished or not training.is_sound or not training.run.ranks.is_first:
        return
    training.doing = f"finishing step {training.step}"
    try:
        _export_early(training, watchers)
    except (UserError, OSError, MemoryError) as error:
        release(error)
        text = f"note: no weights of step {training.step} were written: {sentence(error)}; the training goes on"
        watchers.tell(NoteRecord(training.step, text))


def _newest(training: Training) -> Path | None:
    states = _states(training)
    return states[-1].folder if states else None


def _states(training: Training) -> list[SavedState]:
    return saved_states(training.run.folder / "checkpoints")


def newest_text(training: Training) -> str:
    """Return what is said to those who leave at once: which training state there is, and how to go on."""
    newest = _newest(training)
    if newest is None:
        return "no training state was saved yet"
    config = shlex.quote(str(training.run.folder / "config.toml"))
    return f"the newest whole training state is {newest}; go on: sdtrain fit {config} --resume"
