"""Which bucket each picture of a set goes into, and the views of it that are trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

from sdtrain.config.schema import DataConfig
from sdtrain.data.buckets import Placement, bucket_sizes, place, place_unscaled
from sdtrain.data.counts import stream
from sdtrain.data.examples import Example
from sdtrain.data.masks.mask import nothing_left
from sdtrain.data.scanning.findings import Finding, shortened
from sdtrain.errors import Problem


class Sized(Protocol):
    """What has the size of a picture. resolution_px: what it is trained at; 0: data.resolution_px."""

    @property
    def width_px(self) -> int: ...
    @property
    def height_px(self) -> int: ...
    @property
    def resolution_px(self) -> int: ...


def placements_of(pictures: Sequence[Sized], config: DataConfig) -> list[Placement]:
    """Return the placement of each picture, in their order, as the settings say; of several views the first."""

    @cache
    def buckets(resolution_px: int) -> list[tuple[int, int]]:
        return bucket_sizes(resolution_px, config.bucket_step_px, config.max_aspect)

    def placed(picture: Sized) -> Placement:
        size = picture.width_px, picture.height_px
        placement = place(*size, buckets(picture.resolution_px or config.resolution_px))
        if placement.upscale <= 1 or config.enlarge:
            return placement
        return place_unscaled(*size, config.bucket_step_px, config.max_aspect)

    placements = [placed(picture) for picture in pictures]
    match config.ragged:
        case "keep":
            return placements
        case "merge":
            return _merged(placements, enlarge=config.enlarge)


def views_of(example: Example, placement: Placement) -> tuple[Placement, ...]:
    """Return the views of a picture that are trained, all in the same bucket: its crops, and each of them flipped.

    One crop is the middle; several are spread evenly from one end of what has to be cropped to the other.
    """
    crops = [placement]
    if example.crops > 1:
        across, down = (whole - part for whole, part in zip(placement.scaled, placement.bucket, strict=True))
        last = example.crops - 1
        spread = [
            replace(placement, crop_left=round(across * one / last), crop_top=round(down * one / last))
            for one in range(example.crops)
        ]
        crops = list(dict.fromkeys(spread))  # a picture that is not cropped has one
    flipped = [replace(crop, flipped=True) for crop in crops] if example.flip else []
    return (*crops, *flipped)


def drawn_view(seed: int, step: int, index: int, at: int, num: int) -> int:
    """Return which of `num` views is seen at place `at` of planned micro-batch `index` of a step."""
    return stream(seed, "view", step, index, at).randrange(num) if num > 1 else 0


def at_resolutions(examples: Sequence[Example], resolutions: Sequence[Sequence[int]]) -> list[Example]:
    """Return the examples, each once for every resolution of its folder; those that are held out at the first only.

    resolutions: of each folder of `data.folder`, in pixels; none: data.resolution_px.
    """
    return [
        replace(example, resolution_px=resolution)
        for example in examples
        for resolution in ([example.resolution_px] if example.held_out else resolutions[example.folder] or [0])
    ]


def cropped_masks(examples: Sequence[Example], config: DataConfig) -> list[Problem]:
    """Return a problem for each mask that was read and lets nothing count of what is left of its picture."""
    wrong: dict[Path, str] = {}
    for example, placement in zip(examples, placements_of(examples, config), strict=True):
        mask, look = example.mask, example.mask_look
        bare = [view for view in views_of(example, placement) if look is not None and not look.reaches(view)]
        if mask is not None and bare:
            wrong[mask.path] = nothing_left(bare[0])
    what = "mask that leaves nothing"
    return shortened([Finding(what, Problem(str(path), reason)) for path, reason in wrong.items()])


def _merged(placements: Sequence[Placement], *, enlarge: bool) -> list[Placement]:
    """Return the placements, with each picture that is alone in its bucket moved to the nearest one that is in use.

    The picture that loses least by it moves first; so two that are alone and near one another share a bucket. enlarge:
    whether a picture may be enlarged for it.
    """
    merged = list(placements)
    counts = Counter(placement.bucket for placement in merged)
    while len(counts) > 1:
        moves = [
            (move.cropped_share, number, move)
            for number, placement in enumerate(merged)
            if counts[placement.bucket] == 1
            for move in [place(*placement.original, [bucket for bucket in counts if bucket != placement.bucket])]
            if enlarge or move.upscale <= 1
        ]
        if not moves:
            break
        _, number, move = min(moves, key=lambda one: one[:2])
        del counts[merged[number].bucket]
        counts[move.bucket] += 1
        merged[number] = move
    return merged
