"""What a run writes on its way: previews, training states and averaged weights."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from optim import averaged
from sdtrain.errors import NotFiniteError, UserError
from sdtrain.models.model import Model
from sdtrain.models.tiles import TOLD
from sdtrain.training.computing.objective import Objective
from sdtrain.training.ending.memory import release
from sdtrain.training.ending.rescue import Kept, Saving, keep, sentence
from sdtrain.training.ending.signals import GivenUpError, StopRequests
from sdtrain.training.export import Written, export_files, split_weights
from sdtrain.training.keeping.manifest import SavedState, saved_states
from sdtrain.training.keeping.states import Numbers, UnusableNumbersError, numbers_of, save_state
from sdtrain.training.ranks.group import ToldElsewhereError
from sdtrain.training.run import autocast
from sdtrain.training.training import Training
from sdtrain.training.watching.grid import save_picture
from sdtrain.training.watching.preview import (
    drawn_from,
    in_rows,
    preview_grid,
    render_share,
    sampling_settings,
)
from sdtrain.training.watching.records import NoteRecord, PictureRecord, SavedRecord
from sdtrain.training.watching.summary import farewell
from sdtrain.training.watching.watchers import Watchers
from sdtrain.training.weights_files import NATIVE

ALONE_NOW = "the weights are split over processes, and not all of them could put them together any more"
TRY_AGAIN_STEPS = 25
"""After how many steps a training state that could not be written is tried again."""


def preview(training: Training, watchers: Watchers, stop: StopRequests) -> None:
    """Draw the previews with the averaged weights and write them into `previews/`; the training is as it was before.

    Processes share them. They are given up when the run is asked to end, and left out where they fail.
    """
    step, config, ranks = training.step, training.run.config, training.run.ranks
    if not training.data.prompts.texts or not config.preview.every:
        return
    training.doing = f"giving up the preview of step {step}"
    path = training.run.folder / "previews" / f"step-{step:06d}.png"
    whole = "decoded" not in training.model.tiled
    training.make_room()
    pictures, failure = None, ""
    try:
        pictures = _drawn(training, stop)
    except GivenUpError:
        pass
    except Exception as error:  # noqa: BLE001 - who only looks must not end the run, which could lose hours
        release(error)
        failure = sentence(error)
    if ranks.are_several and not training.is_sharded:
        pictures, failure = _put_together(training, pictures, failure)
    if not ranks.is_first:
        return
    try:
        if pictures is not None:
            rows = in_rows([pictures[number] for number in sorted(pictures)], len(config.preview.seeds))
            grid = preview_grid(rows, training.data.prompts, config, step, path.with_name("base.png"))
            save_picture(grid, path, drawn_from(config, step).words())
    except Exception as error:  # noqa: BLE001 - nor must who keeps what was drawn
        release(error)
        failure = sentence(error)
    if failure:
        watchers.tell(NoteRecord(step, f"note: no preview of step {step}: {failure}; the training goes on"))
    elif pictures is not None:
        if whole and "decoded" in training.model.tiled:
            watchers.tell(NoteRecord(step, f"note: {TOLD['decoded']}"))
        watchers.tell(PictureRecord(step, path))


def _drawn(training: Training, stop: StopRequests) -> dict[int, Image.Image]:
    """Draw this process's share of the previews, by number. Raises GivenUpError when the run is asked to end."""
    config, prompts, share = training.run.config, training.data.prompts, training.looking
    heeded, computing = training.heeded(stop), partial(autocast, config, training.run.device)
    heeded.give_up()
    with _vae_on(training.run.device, training.model), averaged(training.optimizer):
        return render_share(
            *(training.model, prompts, config.preview.seeds, sampling_settings(config), heeded.give_up, computing),
            hand=share.rank,
            hands=share.size,
        )


def _put_together(
    training: Training, mine: dict[int, Image.Image] | None, failure: str
) -> tuple[dict[int, Image.Image] | None, str]:
    """Return the previews of all processes, None where one has given up or failed, and why that was."""
    num = len(training.data.prompts.texts) * len(training.run.config.preview.seeds)
    settings = sampling_settings(training.run.config)
    pixels = None
    if mine is not None:
        pixels = {number: torch.from_numpy(np.array(picture)) for number, picture in mine.items()}
    whole, any_failed = training.run.ranks.put_together(
        pixels, (num, settings.height_px, settings.width_px, 3), failed=bool(failure)
    )
    if any_failed and not failure:
        failure = "it failed on another process"
    if whole is None:
        return None, failure
    return {number: Image.fromarray(one.numpy()) for number, one in enumerate(whole)}, failure


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
    if not training.takes_part:
        return
    training.state_is_owed = True
    if not training.is_sound or training.step < training.try_again_at:
        return
    try:
        save(training, watchers, behind=training.run.config.checkpoint.in_background)
        training.state_is_owed = False
    except (UserError, OSError, MemoryError, ToldElsewhereError) as error:
        release(error)
        _owe(training, watchers, training.step, sentence(error))


def _owe(training: Training, watchers: Watchers, step: int, why: str) -> None:
    """Owe the state of a step that could not be saved."""
    training.state_is_owed, training.try_again_at = True, training.step + TRY_AGAIN_STEPS
    what = f"note: the training state of step {step} could not be saved: {why}; the training goes on"
    watchers.tell(NoteRecord(training.step, f"{what}, and it is tried again at step {training.try_again_at}"))


def save(training: Training, watchers: Watchers, *, keep_all: bool = False, behind: bool = False) -> None:
    """Write the training state into `checkpoints/`, unless it was saved a moment ago.

    keep_all: whether no older state makes room for it. behind: whether the training may go on meanwhile, where there is
    memory for a copy. Numbers that are not finite are not worth a state: the ones that are there stay, which is told.
    """
    training.doing = f"finishing step {training.step}"
    step, is_first = training.step, training.run.ranks.is_first
    finish_saving(training, watchers)
    if step == training.saved_step or not training.takes_part:
        return
    numbers = numbers_of(training.trainable, training.optimizer)
    if not _are_finite(training, numbers, watchers):
        return
    write = partial(
        save_state,
        training.run.folder / "checkpoints",
        step,
        background=training.background,
        settings=training.run.config.checkpoint,
        loss_is_finite=training.is_sound,
        loss_scale=training.scale.state,
        keep_all=keep_all,
    )
    with training.first_writes(numbers.send):
        if is_first:
            watchers.keep_log()
        if is_first and behind and training.behind.has_room_for(numbers):
            training.behind.begin(step, partial(write, numbers.copied()))
        elif is_first:
            watchers.tell(SavedRecord(step, write(numbers), "state"))
    training.saved_step, training.state_is_owed, training.try_again_at = step, False, 0
    if not training.is_sound:
        text = f"step {step} was saved while losses or gradients were not finite: no good state went for it"
        watchers.tell(NoteRecord(step, text))


def _are_finite(training: Training, numbers: Numbers, watchers: Watchers) -> bool:
    """Return whether the numbers of a state are worth one, on all processes that have some of them."""
    what = ""
    try:
        numbers.require_finite()
    except UnusableNumbersError as error:
        what = str(error)
    is_broken = bool(what)
    if training.is_sharded:
        _, is_broken = training.run.ranks.agree(0, is_broken)
    if is_broken:
        what = what or "numbers on another process are not finite"
        text = f"step {training.step} is not saved: {what}; the states of before stay as they are"
        watchers.tell(NoteRecord(training.step, text))
    return not is_broken


def finish_saving(training: Training, watchers: Watchers) -> None:
    """Wait for the state that is written while the training goes on, and tell what became of it.

    Where it could not be written it is owed. Where the training is split over processes, all of them come here.
    """
    behind, why = training.behind, ""
    try:
        if path := behind.end():
            watchers.tell(SavedRecord(behind.step, path, "state"))
    except (UserError, OSError, MemoryError) as error:
        release(error)
        why = sentence(error)
    failed = bool(why)
    if training.is_sharded:
        _, failed = training.run.ranks.agree(0, failed)
    if failed:  # the same on all of them, who save together
        training.saved_step = None
        _owe(training, watchers, behind.step, why or "it failed on the first process")


def validate(training: Training, objective: Objective, watchers: Watchers, stop: StopRequests) -> None:
    """Measure the loss on held-out pictures with the averaged weights, each rank on its share.

    The training is as it was before. Where the loss is the lowest so far the weights are written, and the state of the
    training where states are kept at all. It comes last, so that a run which goes on from it has the weights. All is
    given up when the run is asked to end. What fails is no reason to end the training.
    """
    step, ranks, validator = training.step, training.run.ranks, training.validator
    if validator.held_out is None:
        return
    if training.takes_part:
        finish_saving(training, watchers)  # the best state must not go before a better one is there
    training.doing = f"giving up the validation of step {step}"
    training.make_room()
    mine, failure = None, ""
    try:
        heeded = training.heeded(stop)
        mine = validator.measure(objective, training.optimizer, lambda: heeded.asked, training.looking)
    except Exception as error:  # noqa: BLE001 - who only looks must not end the run, which could lose hours
        release(error)
        failure = sentence(error)
    losses, any_failed = ranks.merge(validator.pictures, mine, failed=bool(failure))
    is_best = False
    try:
        is_best = losses is not None and ranks.is_first and validator.take(losses, step, watchers.tell)
    except Exception as error:  # noqa: BLE001 - nor must who judges it
        release(error)
        failure = sentence(error)
    if training.is_sharded:
        _, is_best = ranks.agree(0, is_best)
    try:
        if is_best:
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
    if not training.takes_part:
        return
    written: list[Written] = []
    with averaged(optimizer):
        whole = split_weights(training.model, run.config)
        with training.first_writes(whole.run_dry), whole:
            if run.ranks.is_first:
                written = export_files(
                    training.model,
                    run.config,
                    path,
                    step=step,
                    examples=training.data.examples,
                    groups=optimizer.metrics(),
                    folder=run.folder,
                    whole=whole,
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
    if not training.takes_part:
        return []
    failed = isinstance(cause, Exception)
    if training.is_sharded and failed and not isinstance(cause, NotFiniteError):
        with suppress(UserError, OSError, MemoryError):  # the newest state that there is is told
            training.behind.end()
        kept = Kept(_newest(training), None, (ALONE_NOW,))  # others are elsewhere, or gone
        return farewell(training.run, training.step, "an error", kept) if training.run.ranks.is_first else []
    finish_saving(training, watchers)
    saving = Saving(
        state=lambda: save(training, watchers, keep_all=failed),
        weights=lambda: _export_early(training, watchers),
        newest=lambda: _newest(training),
    )
    kept = keep(saving, training.optimizer)
    if not training.run.ranks.is_first:
        return []
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
    if not run.ranks.is_first:
        return None
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
    if training.is_finished or not training.is_sound or not training.takes_part:
        return
    training.doing = f"finishing step {training.step}"
    try:
        _export_early(training, watchers)
    except (UserError, OSError, MemoryError, ToldElsewhereError) as error:
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
