"""Aspect-ratio buckets: which sizes there are, and how a picture goes into its own. Pure arithmetic on pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """How one picture goes into its bucket: scaled until it covers the bucket, then cropped around the centre.

    All sizes are (width, height) in pixels; the crop offsets are measured in the scaled picture.
    """

    original: tuple[int, int]
    bucket: tuple[int, int]
    scaled: tuple[int, int]
    crop_left: int
    crop_top: int
    flipped: bool = False  # left and right changed places, after all of the above

    @property
    def upscale(self) -> float:
        """Scaled size over original size; above 1, pixels are invented."""
        return max(self.scaled[0] / self.original[0], self.scaled[1] / self.original[1])

    @property
    def cropped_share(self) -> float:
        """The share of the picture's area that lies outside of the bucket, from 0 to 1."""
        return 1.0 - (self.bucket[0] * self.bucket[1]) / (self.scaled[0] * self.scaled[1])

    @property
    def source_box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what lies in the bucket, in pixels of the original, which may be parts."""
        (width, height), (scaled_width, scaled_height) = self.original, self.scaled
        right, bottom = self.crop_left + self.bucket[0], self.crop_top + self.bucket[1]
        return (
            self.crop_left * width / scaled_width,
            self.crop_top * height / scaled_height,
            min(width, right * width / scaled_width),
            min(height, bottom * height / scaled_height),
        )

    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Return the sizes in pixels that models are told.

        They are original height and width, crop top and left, target height and width; those of the flipped picture
        where it is flipped.
        """
        (width, height), (target_width, target_height) = self.original, self.bucket
        left = self.scaled[0] - target_width - self.crop_left if self.flipped else self.crop_left
        return height, width, self.crop_top, left, target_height, target_width


def bucket_sizes(resolution_px: int, step_px: int, max_aspect: float) -> list[tuple[int, int]]:
    """Return all bucket sizes (width, height), sorted: multiples of step_px with an area of at most resolution_px².

    Every width and every height that the aspect limit allows is there once with the longest other side that fits,
    and so is the square. Raises ValueError if not even one step fits.
    """
    if step_px > resolution_px:
        raise ValueError(f"a step of {step_px} px does not fit into a resolution of {resolution_px} px")
    square = resolution_px // step_px * step_px
    area = resolution_px * resolution_px
    sizes = {(square, square)}
    longest = min(area // step_px, int(resolution_px * max_aspect))
    for side in range(step_px, longest + 1, step_px):
        other = area // side // step_px * step_px
        if other and max(side, other) <= max_aspect * min(side, other):
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def place(width_px: int, height_px: int, buckets: Iterable[tuple[int, int]]) -> Placement:
    """Return the placement in the bucket of the nearest aspect ratio; of equal ones the largest, then the widest.

    Every picture of at least 1 x 1 px gets a place. Nearness is the ratio of the two aspect ratios, which orders
    buckets as the difference of logarithms does; one division of integers is rounded correctly, so that ties are exact.
    """

    def distance(bucket: tuple[int, int]) -> tuple[float, int, int]:
        across, down = width_px * bucket[1], height_px * bucket[0]
        return max(across, down) / min(across, down), -bucket[0] * bucket[1], -bucket[0]

    bucket = min(buckets, key=distance)
    width, height = bucket
    if width * height_px >= height * width_px:
        scaled = width, _divide(height_px * width, width_px)
    else:
        scaled = _divide(width_px * height, height_px), height
    return Placement(
        original=(width_px, height_px),
        bucket=bucket,
        scaled=scaled,
        crop_left=(scaled[0] - width) // 2,
        crop_top=(scaled[1] - height) // 2,
    )


def place_unscaled(width_px: int, height_px: int, step_px: int, max_aspect: float) -> Placement:
    """Return the placement of a picture in the largest bucket that it fills without being enlarged.

    Its sides are multiples of step_px; a picture with a side below step_px is enlarged to it all the same.
    """
    width, height = (max(1, side // step_px) * step_px for side in (width_px, height_px))
    width = min(width, max(step_px, int(height * max_aspect) // step_px * step_px))
    height = min(height, max(step_px, int(width * max_aspect) // step_px * step_px))
    return place(width_px, height_px, [(width, height)])


def _divide(numerator: int, denominator: int) -> int:
    """Return the nearest whole number, halves up: never below the bucket's side when the exact quotient is not."""
    return (numerator + denominator // 2) // denominator
