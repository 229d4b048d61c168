"""Small pictures to look at, with what a step sees of them; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops

from sdtrain.data.buckets import Placement
from sdtrain.data.colours import to_srgb
from sdtrain.data.examples import Example
from sdtrain.data.pictures import load_small

LONGEST_PX = 320
"""The longest side of a small picture."""
_GAP = 3.0  # see Image.resize: shrinks by whole factors first while that cannot be seen
_VEIL = (200, 0, 90)  # over what a mask leaves out
_VEILED = 0.6

Masks = Callable[[Example], Image.Image | None]
"""Where an example's mask comes from: grey at any size, white where it counts and black where it does not; or None."""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture, upright, in sRGB and on white, as a model sees it.

    crop: left, top, width and height of what lies in the bucket, as shares of the picture from 0 to 1.
    """

    image: Image.Image
    crop: tuple[float, float, float, float]


def no_masks(_: Example) -> Image.Image | None:
    """Return None for every example: all of it counts."""
    return None


def thumbnail(example: Example, placement: Placement, masks: Masks = no_masks) -> Thumbnail:
    """Return an example's picture, small, with its crop. What its mask leaves out is tinted. Raises PictureError."""
    image = load_small(example.path, LONGEST_PX * 3 // 2)
    if image.has_transparency_data or image.mode not in ("RGB", "L", "CMYK"):
        image = to_srgb(image)  # these cannot be scaled as they are
    share = min(1.0, LONGEST_PX / max(placement.original))
    width, height = (max(1, round(side * share)) for side in placement.original)
    size = (width, height)
    image = to_srgb(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=_GAP))
    mask = masks(example)
    if mask is not None:
        left_out = ImageChops.invert(mask.convert("L").resize(size, Image.Resampling.BOX))
        image.paste(Image.new("RGB", size, _VEIL), mask=left_out.point(lambda level: round(level * _VEILED)))
    return Thumbnail(image, crop_shares(placement))


def crop_shares(placement: Placement) -> tuple[float, float, float, float]:
    """Return left, top, width and height of what lies in the bucket, as shares of the original from 0 to 1."""
    width, height = placement.original
    left, top, right, bottom = placement.source_box
    return left / width, top / height, (right - left) / width, (bottom - top) / height
