"""The facts of a set of pictures: how many there are, which buckets and batches they make, crops and upscales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sdtrain.config.schema import DataConfig
from sdtrain.data.buckets import Placement
from sdtrain.data.examples import Example
from sdtrain.data.order import Order
from sdtrain.data.placing import placements_of


@dataclass(frozen=True)
class DataReport:
    """Counts and extremes of a set of pictures. Sizes are (width, height) in pixels, shares 0 to 1."""

    num_pictures: int
    num_images: float  # in an epoch, on average: pictures times repeats
    num_captioned: int
    num_uncaptioned: int
    num_batches: float  # micro-batches in an epoch, on average
    steps_per_epoch: float
    buckets: tuple[tuple[tuple[int, int], int], ...]  # (size, pictures in it), sorted by size; empty buckets left out
    upscales: tuple[tuple[float, Example], ...]  # factors above 1, the largest first
    crops: tuple[tuple[float, Example], ...]  # shares of the picture above 0, the largest first
    mean_cropped_share: float
    alone: tuple[Example, ...]  # seen once an epoch, in a bucket without others
    moved: tuple[tuple[Example, Placement], ...]  # into another bucket than the nearest, because they were alone

    @property
    def mean_batch(self) -> float:
        """Images in a micro-batch on average."""
        return self.num_images / self.num_batches


def summarise(examples: Sequence[Example], config: DataConfig) -> DataReport:
    """Return the report on these examples, of which there is at least one, as `config` would place and order them."""
    if not examples:
        raise ValueError("no pictures to report on")
    placements = placements_of(examples, config)
    order = Order(
        [placement.bucket for placement in placements],
        [example.repeats for example in examples],
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation,
        seed=0,
    )
    placed = list(zip(examples, placements, strict=True))
    buckets = Counter(placement.bucket for placement in placements)
    own = placements_of(examples, config.model_copy(update={"ragged": "keep"}))
    crops = [(placement.cropped_share, example) for example, placement in placed]
    upscales = [(placement.upscale, example) for example, placement in placed]
    once = {example.path: example for example in examples}.values()  # of several resolutions
    num_captioned = sum(bool(example.caption) for example in once)
    return DataReport(
        num_pictures=len(once),
        num_images=order.num_images,
        num_captioned=num_captioned,
        num_uncaptioned=len(once) - num_captioned,
        num_batches=order.batches_per_epoch,
        steps_per_epoch=order.steps_per_epoch,
        buckets=tuple(sorted(buckets.items())),
        upscales=_sorted([(factor, example) for factor, example in upscales if factor > 1.0]),
        crops=_sorted([(share, example) for share, example in crops if share > 0.0]),
        mean_cropped_share=sum(share for share, _ in crops) / len(crops),
        alone=tuple(one for one, placement in placed if buckets[placement.bucket] == 1 and one.repeats <= 1),
        moved=tuple((one, new) for (one, new), old in zip(placed, own, strict=True) if new != old),
    )


def _sorted(found: Sequence[tuple[float, Example]]) -> tuple[tuple[float, Example], ...]:
    return tuple(sorted(found, key=lambda one: (-one[0], str(one[1].path))))
