"""What is done before the first step: the model is loaded, and the pictures become batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sdtrain.config.schema import Config
from sdtrain.data.batches import Batches, Encoders, prepare_batches
from sdtrain.data.examples import Example
from sdtrain.data.held_out import held_out_examples, identity, training_examples
from sdtrain.families.words import DENOISER
from sdtrain.models.checkpoints.hub import fetch_if_missing
from sdtrain.models.checkpoints.inspect import OpenedModel, open_model
from sdtrain.models.load import load_model
from sdtrain.models.model import Model
from sdtrain.training.run import Run
from sdtrain.training.validating.held_out import HeldOut
from sdtrain.training.watching.preview import Prompts, prepare_prompts


def open_and_load(run: Run) -> Model:
    """Open and load the model of a run. Raises UserError when it is missing or contradicts the config."""
    fetch_if_missing(run.config.model)
    return load(run, open_model(run.config.model, "model"))


def load(run: Run, opened: OpenedModel) -> Model:
    """Load the model of a run that was opened already. Raises UserError when its weights do not fit."""
    return load_model(
        opened,
        run.config.model,
        device=run.device,
        dtype=run.dtype,
        caption_chunks=run.config.data.caption_chunks,
    )


@dataclass(frozen=True)
class Prepared:
    """What the loop reads: the pictures as batches, those that are held out, and the prompts to preview."""

    examples: list[Example]
    batches: Batches
    prompts: Prompts
    held_out: HeldOut | None


def encode_everything(model: Model, run: Run, examples: list[Example], console: Console) -> Prepared:
    """Return batches and preview prompts; afterwards the VAE and the text encoders have left the device.

    Raises UserError for pictures that cannot be read or encoded, and for a cache that cannot be written.
    """
    model.move_encoders(run.device, text=True)
    trained = training_examples(examples)
    batches = make_batches(model, run, trained, console)
    held_out = prepare_held_out(model, run, examples, console)
    prompts = prepare_prompts(model, run.config, trains_text=trains_text(run.config))
    model.move_encoders(torch.device("cpu"), text=True)
    return Prepared(trained, batches, prompts, held_out)


def prepare_held_out(model: Model, run: Run, examples: Sequence[Example], console: Console) -> HeldOut | None:
    """Return the pictures that are held out, encoded; None where there are none. Raises UserError as `make_batches`."""
    apart = [replace(example, repeats=1) for example in held_out_examples(examples)]
    if not apart:
        return None
    whole = {"caption_dropout": 0.0, "gradient_accumulation": 1}  # every picture once an epoch, one micro-batch a step
    config = run.config.model_copy(
        update={"data": run.config.data.model_copy(update=whole), "seed": run.config.validation.seed}
    )
    batches = make_batches(model, replace(run, config=config), apart, console)
    return HeldOut(batches, {example.path: identity(example.path) for example in apart})


def make_batches(model: Model, run: Run, examples: list[Example], console: Console) -> Batches:
    """Encode what the cache lacks and return the batches. Raises UserError for pictures that cannot be read."""
    config = run.config
    vae, text = model.fingerprints()
    encoders = Encoders(
        pixels=model.encode_pixels,
        captions=None if trains_text(run.config) else torch.no_grad()(model.encode_captions),
        vae_fingerprint=vae,
        text_fingerprint=text,
        sizes=model.encode_sizes,
    )
    cache = Path(config.data.cache or Path(config.output) / "cache").expanduser()
    with _EncodingProgress(console) as progress:
        return prepare_batches(
            config.data, examples, encoders, cache=cache, seed=config.seed, on_progress=progress.show
        )


def trains_text(config: Config) -> bool:
    """Return whether a network that reads captions is trained, so that captions are encoded anew at every step."""
    return any(network != DENOISER for network in config.method.train)


class _EncodingProgress:
    """A progress bar while pictures and captions are encoded; nothing is shown where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _EncodingProgress:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are encoded; `what` names them."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done)
