"""What a person should know about their pictures before training: numbers, buckets, crops and upscales by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.schema import DataConfig
from sdtrain.data.buckets import bucket_sizes, place
from sdtrain.data.examples import Example
from sdtrain.data.order import Order


@dataclass(frozen=True)
class DataReport:
    """Counts and extremes of a set of pictures. Sizes are (width, height) in pixels, shares 0 to 1."""

    num_pictures: int
    num_images: int  # in an epoch: pictures times repeats
    num_captioned: int
    num_uncaptioned: int
    steps_per_epoch: float
    buckets: tuple[tuple[tuple[int, int], int], ...]  # (size, pictures in it), sorted by size; empty buckets left out
    num_upscaled: int
    worst_upscale: tuple[float, Path]  # factor; 1 or less: none is upscaled
    mean_cropped_share: float
    worst_cropped: tuple[float, Path]


def summarise(examples: Sequence[Example], config: DataConfig) -> DataReport:
    """Return the report on these examples, of which there is at least one, as `config` would place and order them."""
    if not examples:
        raise ValueError("no pictures to report on")
    buckets = bucket_sizes(config.resolution_px, config.bucket_step_px, config.max_aspect)
    placements = [place(example.width_px, example.height_px, buckets) for example in examples]
    order = Order(
        [placement.bucket for placement in placements],
        [example.repeats for example in examples],
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation,
        seed=0,
    )
    upscales = [(one.upscale, example.path) for one, example in zip(placements, examples, strict=True)]
    crops = [(one.cropped_share, example.path) for one, example in zip(placements, examples, strict=True)]
    num_captioned = sum(bool(example.caption) for example in examples)
    return DataReport(
        num_pictures=len(examples),
        num_images=order.num_images,
        num_captioned=num_captioned,
        num_uncaptioned=len(examples) - num_captioned,
        steps_per_epoch=order.steps_per_epoch,
        buckets=tuple(sorted(Counter(placement.bucket for placement in placements).items())),
        num_upscaled=sum(factor > 1.0 for factor, _ in upscales),
        worst_upscale=max(upscales),
        mean_cropped_share=sum(share for share, _ in crops) / len(crops),
        worst_cropped=max(crops),
    )
