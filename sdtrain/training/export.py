"""Writes the files that a run leaves: they hold the averaged weights, never the training's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import torch
from torch import Tensor

from optim import GroupMetrics, is_sharded
from sdtrain.adapters.attach import adapter_weights
from sdtrain.adapters.conversion import Form, converted
from sdtrain.adapters.formats.lora_file import write_lora
from sdtrain.adapters.kinds import Adapters, delta, idle_networks
from sdtrain.adapters.low_rank import RankRule
from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.config.settings.export import ExportConfig
from sdtrain.data.examples import Example
from sdtrain.errors import user_error
from sdtrain.families.words import Component
from sdtrain.models.checkpoints.single_file import Change, weights_of
from sdtrain.models.model import Model
from sdtrain.training.describing.facts import description_of, file_facts
from sdtrain.training.ranks.shards import whole_one_by_one
from sdtrain.training.ranks.streams import Stream
from sdtrain.training.weights_files import weights_files

Format = Literal["sd-scripts", "diffusers", "single-file", "folder"]
TOLD_ERROR, LARGE_ERROR = 1e-3, 0.05
"""The shares of the change whose loss is told, and that are worth advice."""


def export_weights(
    model: Model,
    config: Config,
    path: Path,
    *,
    kind: Format,
    step: int,
    examples: Sequence[Example],
    groups: Sequence[GroupMetrics],
    folder: Path,
    form: Form = "native",
    strength: float = 1.0,
    whole: Stream | None = None,
) -> float:
    """Write the weights that the networks hold now to `path`, whole or not at all.

    Call it inside `averaged(optimizer)`. A whole checkpoint of a LoRA run has the adapters merged in. folder: that of
    the run. form: of adapters. strength: how often the change is counted, written into the file. Returns the share of
    the change that is lost in the form, |dW - written| / |dW|. whole: the weights of networks that are split over
    processes, in the order of `split_weights`; None: none is. Raises UserError for a full disk, for weights that are
    not finite, and for adapter names of a run that has no adapters.
    """
    adapters = trained_adapters(model, config)
    match kind:
        case "sd-scripts" | "diffusers":
            if not adapters:
                what = f"{kind} holds adapters, this run trains all weights; use single-file or folder, or extract"
                raise user_error(str(path), "format", what)
            require_change(path, adapters)
            facts = file_facts(model, config, step, examples, groups, folder)
            rule = RankRule(config.export.rank, config.export.energy)
            found = converted(adapters, model.networks, form, rule, strength)
            write_lora(path, found.adapters, model.networks, names=kind, facts=facts, dtype=stored_dtype(config.export))
            return found.error
        case "single-file" | "folder":
            if strength != 1 and not adapters:
                what = f"{strength:g}, but this run trains all weights, which have no strength; leave it at 1"
                raise user_error(str(path), "--strength", what)
            dtype = None if adapters else stored_dtype(config.export)
            description = description_of(config, step, examples, groups, folder)
            change = merging(adapters, strength) if adapters or whole is None else taken_from(whole)
            model.write_checkpoint(path, description, layout=kind, dtype=dtype, change=change)
            return 0.0
        case _:
            assert_never(kind)


@dataclass(frozen=True)
class Written:
    """A file that was written, and the share of the change that is lost in its form."""

    path: Path
    error: float
    rank: int
    """The highest rank that was allowed, where that is what loses."""

    @property
    def note(self) -> str:
        """What a person must know of it; empty where nothing is lost that shows."""
        if self.error < TOLD_ERROR:
            return ""
        advice = f'raise export.rank above {self.rank}, or use export.form = "diff"'
        return f"{self.path.name} is a LoRA that misses {self.error:.1%} of the change |dW|" + (
            f": {advice}" if self.error > LARGE_ERROR else ""
        )


def export_files(
    model: Model,
    config: Config,
    path: Path,
    *,
    step: int,
    examples: Sequence[Example],
    groups: Sequence[GroupMetrics],
    folder: Path,
    whole: Stream | None = None,
) -> list[Written]:
    """Write the files that a run leaves, the main one to `path`; return them, the main one last. folder: the run's.
    whole: see `export_weights`.

    Call it inside `averaged(optimizer)`. Raises UserError as `export_weights` does.
    """
    files = weights_files(config)
    if not files:
        export_weights(
            *(model, config, path),
            kind="single-file",
            step=step,
            examples=examples,
            groups=groups,
            folder=folder,
            whole=whole,
        )
        return [Written(path, 0.0, 0)]
    found = []
    for file in files:
        target = file.at(path)
        error = export_weights(
            model,
            config,
            target,
            kind=file.names,
            step=step,
            examples=examples,
            groups=groups,
            folder=folder,
            form=file.form,
        )
        found.append(Written(target, error, config.export.rank))
    return found


def trained_adapters(model: Model, config: Config) -> Adapters:
    """Return the adapters of a run by network and layer, as the networks hold them now; empty for a full fine-tune."""
    match config.method:
        case LoraConfig():
            return {name: adapter_weights(model.networks[name]) for name in config.method.train}
        case FullConfig():
            return {}
        case _:
            assert_never(config.method)


def require_change(path: Path, adapters: Adapters) -> None:
    """Raise UserError for adapters that change nothing, as fresh ones do, rather than writing them to `path`."""
    if len(idle_networks(adapters)) == len(adapters):
        what = "every up matrix is zero, so it would change no picture: no step had an effect; look at the log's losses"
        raise user_error(str(path), "adapters", what)


def merging(adapters: Adapters, strength: float = 1.0) -> Change:
    """Return a change of weights that adds each layer's dW times a strength, in float32, just before it is written."""

    def change(component: Component, name: str, weight: Tensor) -> Tensor:
        adapter = adapters.get(component, {}).get(name.removesuffix(".weight"))
        if adapter is None or not name.endswith(".weight"):
            return weight
        return weight.float() + strength * delta(adapter, weight).to(weight.device)

    return change


def split_weights(model: Model, config: Config) -> Stream:
    """Return those of the weights that are split over processes, whole, in the order in which they are written."""
    split = {
        f"{component}/{name}": weight
        for component, network in model.networks.items()
        for name, weight in weights_of(network).items()
        if is_sharded(weight)
    }
    order = model.order_of_weights(stored_dtype(config.export)) if split else []
    names = [f"{component}/{name}" for component, name in order]
    return whole_one_by_one({name: split[name] for name in names if name in split})


def taken_from(whole: Stream) -> Change:
    """Return a change that takes the values of weights that are split over processes from where they come whole."""

    def change(component: Component, name: str, weight: Tensor) -> Tensor:
        return whole.take(f"{component}/{name}") if is_sharded(weight) else weight

    return change


def stored_dtype(export: ExportConfig) -> torch.dtype | None:
    """Return the type in which weights are stored.

    None means that adapters are stored in float32, and checkpoints as their base was stored.
    """
    match export.dtype:
        case "auto":
            return None
        case "float32":
            return torch.float32
        case "float16":
            return torch.float16
        case "bfloat16":
            return torch.bfloat16
        case _:
            assert_never(export.dtype)
