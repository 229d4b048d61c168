"""`sdtrain view`: what a step of a run trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.commands.libraries import quiet_pillow
from sdtrain.config.read import read_draft
from sdtrain.config.schema import Config
from sdtrain.data.identity.held_out import training_examples
from sdtrain.data.report.each import scale_text
from sdtrain.data.report.names import counted, shown_text
from sdtrain.data.report.steps import Planned, Steps
from sdtrain.errors import user_error
from sdtrain.families.words import LATENT_FACTOR_PX
from sdtrain.training.computing.objective import draw_inputs
from sdtrain.training.run import generator_of
from sdtrain.training.start import inspect_run, trains_text


@dataclass(frozen=True)
class PlannedStep:
    """What a step trains on. batches: its micro-batches; timesteps: those of each."""

    config: Config
    step: int
    epoch: int
    batches: list[list[Planned]]
    timesteps: list[list[int]]


def planned_step(path: Path, overrides: Sequence[str], step: int) -> PlannedStep:
    """Return the pictures of a step with their captions, crops and timesteps, as they are drawn for it.

    step: counted as in the log, from 1. Nothing is encoded and nothing is written. Raises UserError with all that is
    wrong with the config, its model and its pictures, or if the run has no such step.
    """
    draft = read_draft(path, overrides)
    quiet_pillow()
    opened, examples = inspect_run(draft, decode=False)
    config, examples = draft.require_sound(), training_examples(examples)
    if step > config.steps:
        raise user_error(str(path), "--step", f"{step} is beyond steps = {config.steps}, the last step of this run")
    steps = Steps(config.data, examples, seed=config.seed, captions_are_encoded_ahead=not trains_text(config))
    batches = [list(batch) for batch in steps.at(step - 1)]
    channels = int(opened.family.vae["latent_channels"])
    timesteps = [_timesteps(config, batch, step - 1, index, channels) for index, batch in enumerate(batches)]
    return PlannedStep(config, step, steps.epoch_of(step - 1) + 1, batches, timesteps)


def step_lines(found: PlannedStep) -> list[str]:
    """Return what a step trains on as a person reads it."""
    num_pictures = sum(len(batch) for batch in found.batches)
    lines = [f"step {found.step} of {found.config.steps}, in epoch {found.epoch}: {counted(num_pictures)}"]
    for batch, timesteps in zip(found.batches, found.timesteps, strict=True):
        lines += _batch_lines(found.config, batch, timesteps)
    return lines


def step_answer(found: PlannedStep) -> dict[str, object]:
    """Return the same for programs: micro-batches, each a list of pictures."""
    batches = [
        [_picture_answer(one, timestep) for one, timestep in zip(batch, timesteps, strict=True)]
        for batch, timesteps in zip(found.batches, found.timesteps, strict=True)
    ]
    return {"step": found.step, "steps": found.config.steps, "epoch": found.epoch, "batches": batches}


def _picture_answer(one: Planned, timestep: int) -> dict[str, object]:
    mask = one.example.mask
    width, height = one.placement.bucket
    return {
        "path": str(one.example.path),
        "caption": one.caption,
        "timestep": timestep,
        "width_px": width,
        "height_px": height,
        "crop": _crop(one),
        "mask": None if mask is None else "alpha" if mask.is_alpha else str(mask.path),
    }


def _timesteps(config: Config, batch: Sequence[Planned], step: int, index: int, channels: int) -> list[int]:
    """The timesteps of a planned micro-batch, drawn as the loop draws them: after the noise, from one generator."""
    width, height = batch[0].placement.bucket
    shape = (len(batch), channels, height // LATENT_FACTOR_PX, width // LATENT_FACTOR_PX)
    _, _, timesteps, _ = draw_inputs(config, shape, generator_of(config.seed, "noise", step, index))
    return [int(timestep) for timestep in timesteps]


def _batch_lines(config: Config, batch: Sequence[Planned], timesteps: Sequence[int]) -> Iterator[str]:
    width, height = batch[0].placement.bucket
    yield f"  {counted(len(batch))} at {width}x{height}"
    for one, timestep in zip(batch, timesteps, strict=True):
        yield f"    {shown_text(str(one.example.path))}"
        yield f"      timestep {timestep}; {_crop(one)}"
        yield f"      {_caption(config, one)}"
        if mask := one.example.mask:
            floor = f", and at least {mask.floor:g} counts everywhere" if mask.floor else ""
            yield f"      mask: {'its alpha channel' if mask.is_alpha else shown_text(str(mask.path))}{floor}"


def _crop(one: Planned) -> str:
    return scale_text(one.placement)


def _caption(config: Config, one: Planned) -> str:
    if one.caption:
        return f"caption: {shown_text(one.caption)}"
    dropped = config.data.caption_dropout > 0 and bool(one.example.caption)
    return "no caption (dropped in this step)" if dropped else "no caption"
