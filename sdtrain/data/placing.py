"""Which bucket each picture of a set goes into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sdtrain.config.schema import DataConfig
from sdtrain.data.buckets import Placement, bucket_sizes, place
from sdtrain.data.examples import Example


def placements_of(examples: Sequence[Example], config: DataConfig) -> list[Placement]:
    """Return the placement of each picture, in their order, as the settings say."""
    buckets = bucket_sizes(config.resolution_px, config.bucket_step_px, config.max_aspect)
    placements = [place(example.width_px, example.height_px, buckets) for example in examples]
    match config.ragged:
        case "keep":
            return placements
        case "merge":
            return _merged(placements)


def _merged(placements: Sequence[Placement]) -> list[Placement]:
    """Return the placements, with each picture that is alone in its bucket moved to the nearest one that is in use.

    The picture that loses least by it moves first; so two that are alone and near one another share a bucket.
    """
    merged = list(placements)
    counts = Counter(placement.bucket for placement in merged)
    while len(counts) > 1:
        moves = [
            (move.cropped_share, number, move)
            for number, placement in enumerate(merged)
            if counts[placement.bucket] == 1
            for move in [place(*placement.original, [bucket for bucket in counts if bucket != placement.bucket])]
        ]
        if not moves:
            break
        _, number, move = min(moves, key=lambda one: one[:2])
        del counts[merged[number].bucket]
        counts[move.bucket] += 1
        merged[number] = move
    return merged
