"""What a run knows of its training and writes into the header of its files, in the forms that web interfaces read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from optim import GroupMetrics
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.data.examples import Example
from sdtrain.data.placing import placements_of
from sdtrain.families.metadata import (
    BUCKETS_KEY,
    CONFIG_KEY,
    D_KEY,
    FOLDERS_KEY,
    TAGS_KEY,
    now,
    started_entry,
    steps_entry,
)
from sdtrain.families.modelspec import Description
from sdtrain.families.words import Resolution
from sdtrain.models.model import Model
from sdtrain.training.describing.author import author_entries
from sdtrain.training.watching.report.about import read_about


def file_facts(
    model: Model,
    config: Config,
    step: int,
    examples: Sequence[Example],
    groups: Sequence[GroupMetrics],
    folder: Path,
) -> FileFacts:
    """Return what other tools and a later run want to know about an adapter file. folder: that of the run."""
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
        d={group.name: group.found_d for group in groups},
        more={**author_entries(config, folder), **training_entries(config, examples, folder)},
    )


def description_of(
    config: Config, step: int, examples: Sequence[Example], groups: Sequence[GroupMetrics], folder: Path
) -> Description:
    """Return the same for a whole checkpoint."""
    return Description(
        title=config.name,
        resolution_px=trained_size(config),
        more={
            CONFIG_KEY: config_to_toml(config),
            **steps_entry(step),
            TAGS_KEY: json.dumps(tag_counts(examples)),
            D_KEY: json.dumps({group.name: group.found_d for group in groups}),
            **author_entries(config, folder),
            **training_entries(config, examples, folder),
        },
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


def training_entries(config: Config, examples: Sequence[Example], folder: Path) -> dict[str, str]:
    """Return the entries that the cards of web interfaces show: buckets, folders, and when the training began."""
    entries = {
        BUCKETS_KEY: json.dumps(bucket_info(config, examples)),
        FOLDERS_KEY: json.dumps(dataset_dirs(examples)),
    }
    return (entries if examples else {}) | started_entry(read_about(folder).started)


def bucket_info(config: Config, examples: Sequence[Example]) -> dict[str, object]:
    """Return the buckets and how many pictures of an epoch lie in each, as sd-scripts tells it.

    mean_img_ar_error: by how much the aspect ratios of pictures differ from those of their buckets, in the mean over
    an epoch.
    """
    counts: dict[Resolution, float] = {}
    error, total = 0.0, sum(example.repeats for example in examples)
    for example, placement in zip(examples, placements_of(examples, config.data), strict=True):
        width, height = placement.bucket
        counts[placement.bucket] = counts.get(placement.bucket, 0.0) + example.repeats
        error += example.repeats * abs(example.width_px / example.height_px - width / height)
    buckets = {
        str(number): {"resolution": list(size), "count": round(counts[size])}
        for number, size in enumerate(sorted(counts))
    }
    return {"buckets": buckets, "mean_img_ar_error": error / total if total else 0.0}


def dataset_dirs(examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Return folder -> how many pictures it has and how often each is seen in an epoch, as sd-scripts tells it."""
    found: dict[str, dict[str, float]] = {}
    for example in examples:
        told = found.setdefault(example.path.parent.name, {"n_repeats": example.repeats, "img_count": 0})
        told["img_count"] += 1
    return found
