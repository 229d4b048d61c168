"""What is done before the first step: the model is loaded, and the pictures become batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from rich.console import Console
from torch import Tensor

from sdtrain.adapters.quantised.layer import quantise
from sdtrain.adapters.quantised.packing import Packed, Packing, packed
from sdtrain.config.schema import Config
from sdtrain.data.batches import Batches, encode_share, prepare_batches
from sdtrain.data.encoding import Encoders
from sdtrain.data.examples import Example
from sdtrain.data.identity.held_out import identity
from sdtrain.data.order import Plan
from sdtrain.families.words import DENOISER
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.fill import read_again
from sdtrain.models.checkpoints.hub import fetch_if_missing
from sdtrain.models.checkpoints.inspect import OpenedModel, open_model
from sdtrain.models.load import load_model, model_of
from sdtrain.models.model import Model
from sdtrain.models.tiles import TOLD
from sdtrain.training.computing.preservation import Preservation, prepare_preservation
from sdtrain.training.keeping.standing import Standing, cache_folder
from sdtrain.training.run import Run
from sdtrain.training.start import trains_text
from sdtrain.training.validating.held_out import HeldOut
from sdtrain.training.watching.preview import Prompts, prepare_prompts
from sdtrain.training.watching.progress import ProgressLines
from sdtrain.training.watching.text import say


def open_and_load(run: Run) -> Model:
    """Open and load the model of a run as it is. Raises UserError when it is missing or contradicts the config."""
    fetch_if_missing(run.config.model)
    return load_as_it_is(run, open_model(run.config.model, "model"))


def load(run: Run, opened: OpenedModel) -> Model:
    """Load the model of a run that was opened already, its frozen base packed as `model.base_precision` says.

    Raises UserError when its weights do not fit.
    """
    if run.config.model.base_precision == "full":
        return load_as_it_is(run, opened)
    components = load_components(opened, run.dtype)
    stored = components.stored[DENOISER]
    pack_base(components, run, lambda name: read_again(stored[name], run.dtype), packed)
    return model_of(components, run.config.model, device=run.device, caption_chunks=run.config.data.caption_chunks)


def pack_base(
    components: Components,
    run: Run,
    original: Callable[[str], Tensor],
    pack: Callable[[Tensor, Packing], Packed],
) -> None:
    """Pack the U-Net as `model.base_precision` says, onto the run's device; original and pack: see `quantise`."""
    match run.config.model.base_precision:
        case "full":
            return
        case "int8" | "fp8" | "nf4" as packing:
            quantise(components.unet, packing, run.device, original, pack)
        case _ as never:
            assert_never(never)


def load_as_it_is(run: Run, opened: OpenedModel) -> Model:
    """Load the model of a run that was opened already, nothing of it packed.

    Raises UserError when its weights do not fit.
    """
    return load_model(
        opened,
        run.config.model,
        device=run.device,
        dtype=run.dtype,
        caption_chunks=run.config.data.caption_chunks,
    )


@dataclass(frozen=True)
class Prepared:
    """What the loop reads: the pictures as batches, those that are held out, the prompts to preview, and what holds the
    model to its base."""

    examples: list[Example]
    batches: Batches
    prompts: Prompts
    held_out: HeldOut | None
    preservation: Preservation | None = None

    def close(self) -> None:
        """End the threads that read ahead."""
        self.batches.close()
        if self.held_out is not None:
            self.held_out.batches.close()


def encode_a_share(model: Model, run: Run, standing: Standing, console: Console) -> None:
    """Fill the cache together with the other processes of the run, each its share of pictures and captions."""
    place, config, apart = run.ranks.place, run.config, seen_whole(standing.held_out)
    model.move_encoders(run.device, text=True)
    for settings, examples, digests in (
        (config, standing.examples, standing.digests),
        (held_out_config(config), apart, standing.held_out_digests),
    ):
        with ProgressLines(console) as progress:
            encode_share(
                *(settings.data, examples, encoders_of(model, settings)),
                cache=cache_folder(config),
                on_progress=progress.show,
                digests=digests,
                hand=place.rank,
                hands=place.size,
            )
    run.ranks.wait_for_all()


def encode_everything(model: Model, run: Run, standing: Standing, console: Console) -> Prepared:
    """Return batches and preview prompts; afterwards the VAE has left the device, and text encoders that train nothing.

    The U-Net comes there last, so that what encodes and what is trained need not fit together.
    Where one of a model's text encoders is trained, all of them stay: their outputs are put together at every step.
    Raises UserError for pictures that cannot be read or encoded, and for a cache that cannot be written.
    """
    model.move_encoders(run.device, text=True)
    verify = standing.verifies_cache
    batches = make_batches(
        *(model, run, standing.examples, console), plan=standing.plan, digests=standing.digests, verify=verify
    )
    held_out = prepare_held_out(model, run, standing, console)
    if "encoded" in model.tiled:
        say(console, f"note: {TOLD['encoded']}")
    prompts = prepare_prompts(model, run.config, trains_text=trains_text(run.config))
    preservation = prepare_preservation(model, run.config.preserve, trains_text=trains_text(run.config))
    model.move_encoders(torch.device("cpu"), text=not trains_text(run.config))
    model.place()
    return Prepared(standing.examples, batches, prompts, held_out, preservation)


def prepare_held_out(model: Model, run: Run, standing: Standing, console: Console) -> HeldOut | None:
    """Return the pictures that are held out, encoded; None where there are none. Raises UserError as `make_batches`."""
    apart = seen_whole(standing.held_out)
    if not apart:
        return None
    batches = make_batches(
        *(model, replace(run, config=held_out_config(run.config)), apart, console),
        digests=standing.held_out_digests,
        verify=standing.verifies_cache,
    )
    return HeldOut(batches, {example.path: identity(example.path) for example in apart})


def seen_whole(examples: Sequence[Example]) -> list[Example]:
    """Return pictures that are held out, each once, in one view and with one caption.

    So the loss of each follows from the picture alone, whatever others there are.
    """
    return [replace(example, repeats=1, flip=False, crops=1, varied=None) for example in examples]


def held_out_config(config: Config) -> Config:
    """Return the settings of the pictures that are held out: each once an epoch, one micro-batch a step, as it is."""
    whole = {"caption_dropout": 0.0, "gradient_accumulation": 1}
    return config.model_copy(update={"data": config.data.model_copy(update=whole), "seed": config.validation.seed})


def make_batches(
    model: Model,
    run: Run,
    examples: Sequence[Example],
    console: Console,
    *,
    plan: Plan | None = None,
    digests: Sequence[bytes] | None = None,
    verify: bool = False,
) -> Batches:
    """Encode what the cache lacks and return the batches. Raises UserError for pictures that cannot be read.

    plan, digests and verify: see `prepare_batches`.
    """
    config, encoders = run.config, encoders_of(model, run.config)
    with ProgressLines(console) as progress:
        return prepare_batches(
            config.data,
            examples,
            encoders,
            cache=cache_folder(config),
            seed=config.seed,
            on_progress=progress.show,
            plan=plan,
            digests=digests,
            verify=verify,
            pin=run.device.type == "cuda",
        )


def encoders_of(model: Model, config: Config) -> Encoders:
    """Return what encodes the pictures and captions of a run."""
    vae, text = model.fingerprints()
    return Encoders(
        pixels=model.encode_pixels,
        captions=None if trains_text(config) else torch.no_grad()(model.encode_captions),
        vae_fingerprint=vae,
        text_fingerprint=text,
        sizes=model.encode_sizes,
    )
