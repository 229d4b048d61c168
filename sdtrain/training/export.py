"""Writes the files that a run leaves: they hold the averaged weights, never the training's own."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import torch
from torch import Tensor

from optim import GroupMetrics
from sdtrain.adapters.attach import adapter_weights
from sdtrain.adapters.conversion import Form, converted
from sdtrain.adapters.formats.lora_file import write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import Adapters, delta, idle_networks
from sdtrain.adapters.low_rank import RankRule
from sdtrain.config.schema import Config, ExportConfig, FullConfig, LoraConfig
from sdtrain.config.write import config_to_toml
from sdtrain.data.examples import Example
from sdtrain.errors import user_error
from sdtrain.families.metadata import CONFIG_KEY, now, steps_entry
from sdtrain.families.modelspec import Description
from sdtrain.families.words import Component, Resolution
from sdtrain.models.checkpoints.single_file import Change
from sdtrain.models.model import Model
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
    form: Form = "native",
    strength: float = 1.0,
) -> float:
    """Write the weights that the networks hold now to `path`, whole or not at all.

    Call it inside `averaged(optimizer)`. A whole checkpoint of a LoRA run has the adapters merged in. form: of
    adapters. strength: how often the change is counted, written into the file. Returns the share of the change that is
    lost in the form, |dW - written| / |dW|. Raises UserError for a full disk, for weights that are not finite, and for
    adapter names of a run that has no adapters.
    """
    adapters = trained_adapters(model, config)
    match kind:
        case "sd-scripts" | "diffusers":
            if not adapters:
                what = f"{kind} holds adapters, this run trains all weights; use single-file or folder, or extract"
                raise user_error(str(path), "format", what)
            require_change(path, adapters)
            facts = file_facts(model, config, step, examples, groups)
            rule = RankRule(config.export.rank, config.export.energy)
            found = converted(adapters, model.networks, form, rule, strength)
            write_lora(path, found.adapters, model.networks, names=kind, facts=facts, dtype=stored_dtype(config.export))
            return found.error
        case "single-file" | "folder":
            description = Description(
                title=config.name,
                resolution_px=trained_size(config),
                more={
                    CONFIG_KEY: config_to_toml(config),
                    **steps_entry(step),
                    "ss_tag_frequency": json.dumps(tag_counts(examples)),
                },
            )
            if strength != 1 and not adapters:
                what = f"{strength:g}, but this run trains all weights, which have no strength; leave it at 1"
                raise user_error(str(path), "--strength", what)
            dtype = None if adapters else stored_dtype(config.export)
            model.write_checkpoint(path, description, layout=kind, dtype=dtype, change=merging(adapters, strength))
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
    model: Model, config: Config, path: Path, *, step: int, examples: Sequence[Example], groups: Sequence[GroupMetrics]
) -> list[Written]:
    """Write the files that a run leaves, the main one to `path`; return them, the main one last.

    Call it inside `averaged(optimizer)`. Raises UserError as `export_weights` does.
    """
    files = weights_files(config)
    if not files:
        export_weights(model, config, path, kind="single-file", step=step, examples=examples, groups=groups)
        return [Written(path, 0.0, 0)]
    found = []
    for file in files:
        target = file.at(path)
        error = export_weights(
            model, config, target, kind=file.names, step=step, examples=examples, groups=groups, form=file.form
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


def file_facts(
    model: Model, config: Config, step: int, examples: Sequence[Example], groups: Sequence[GroupMetrics]
) -> FileFacts:
    """Return what other tools and a later run want to know about an adapter file."""
    images = config.data.batch_size * config.data.gradient_accumulation * step
    return FileFacts(
        title=config.name,
        date=now(),
        prediction=model.prediction,
        resolution_px=trained_size(config),
        steps=step,
        num_images=len(examples),
        num_epochs=math.ceil(images / max(1, sum(example.repeats for example in examples))),
        base_model=Path(config.model.path).name,
        optimizer="optim.ProdigyPlusScheduleFree",
        tag_counts=tag_counts(examples),
        config_toml=config_to_toml(config),
        d={group.name: group.d for group in groups},
    )


def trained_size(config: Config) -> Resolution:
    """Return the size of the pictures of a run: that of a square, whose area none of its buckets exceeds."""
    return (config.data.resolution_px, config.data.resolution_px)


def tag_counts(examples: Sequence[Example]) -> Mapping[str, Mapping[str, int]]:
    """Return folder -> comma-separated part of a caption -> the number of captions that have it."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        tags = {tag.strip() for tag in example.caption.split(",")} - {""}
        counts.setdefault(example.path.parent.name, Counter()).update(sorted(tags))
    return counts
