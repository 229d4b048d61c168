"""The files a run leaves: averaged weights, never the training's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import assert_never

import torch

from optim import GroupMetrics
from sdtrain.adapters.formats import write_lora
from sdtrain.adapters.lora import lora_weights
from sdtrain.adapters.metadata import FileFacts
from sdtrain.config.schema import Config, ExportConfig, FullConfig, LoraConfig
from sdtrain.config.write import config_to_toml
from sdtrain.data.examples import Example
from sdtrain.models.model import Model
from sdtrain.models.modelspec import Description

STEP_KEY = "sdtrain.step"
CONFIG_KEY = "sdtrain.config"


def export_weights(
    model: Model,
    config: Config,
    path: Path,
    *,
    step: int,
    examples: Sequence[Example],
    groups: Sequence[GroupMetrics],
) -> None:
    """Write the weights the networks hold now to `path`, whole or not at all. Call it inside `averaged(optimizer)`.

    Adapters go under the names `export.names`; a full fine-tune becomes a checkpoint in the original single-file
    layout. Raises UserError for a full disk and for weights that are not finite.
    """
    method = config.method
    match method:
        case LoraConfig():
            write_lora(
                path,
                {name: lora_weights(model.networks[name]) for name in method.train},
                model.networks,
                names=config.export.names,
                facts=file_facts(model, config, step, examples, groups),
                dtype=stored_dtype(config.export),
            )
        case FullConfig():
            description = Description(
                title=config.name,
                resolution_px=config.data.resolution_px,
                more={CONFIG_KEY: config_to_toml(config), STEP_KEY: str(step)},
            )
            model.write_checkpoint(path, description, stored_dtype(config.export))
        case _:
            assert_never(method)


def stored_dtype(export: ExportConfig) -> torch.dtype | None:
    """The type weights are stored in; None: adapters in float32, checkpoints as their base was stored."""
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
    """What other tools and a later run want to know about an adapter file."""
    images = config.data.batch_size * config.data.gradient_accumulation * step
    side = config.data.resolution_px
    return FileFacts(
        title=config.name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        prediction=model.prediction,
        resolution_px=(side, side),
        steps=step,
        num_images=len(examples),
        num_epochs=math.ceil(images / max(1, sum(example.repeats for example in examples))),
        base_model=Path(config.model.path).name,
        optimizer="optim.ProdigyPlusScheduleFree",
        tag_counts=tag_counts(examples),
        config_toml=config_to_toml(config),
        d={group.name: group.d for group in groups},
    )


def tag_counts(examples: Sequence[Example]) -> Mapping[str, Mapping[str, int]]:
    """Folder -> comma-separated part of a caption -> how many captions have it."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        tags = {tag.strip() for tag in example.caption.split(",")} - {""}
        counts.setdefault(example.path.parent.name, Counter()).update(sorted(tags))
    return counts
