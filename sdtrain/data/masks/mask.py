"""A mask of a picture, looked at: what can be used, and how much of the picture it leaves. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageStat

from sdtrain.data.buckets import Placement
from sdtrain.data.pictures import BROKEN, PictureError, load_upright, measure

if TYPE_CHECKING:
    import numpy as np

_SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_NEARLY_GREY = 8  # of 255: what a colour profile may make of grey


@dataclass(frozen=True)
class Mask:
    """Which part of a picture counts. path: its file; the picture's own where its alpha channel is the mask.

    floor: what counts at least, from 0 to 1, where the mask says less.
    """

    path: Path
    is_alpha: bool
    floor: float


@dataclass(frozen=True)
class MaskLook:
    """What a mask lets count of a picture, without its floor. share: of its area, from 0 to 1. box: left, top, right
    and bottom of all that counts at all, in pixels."""

    share: float
    box: tuple[int, int, int, int]

    def reaches(self, placement: Placement) -> bool:
        """Return whether the box reaches into what a placement leaves of the picture."""
        left, top, right, bottom = placement.source_box
        return self.box[0] < right and self.box[2] > left and self.box[1] < bottom and self.box[3] > top


def nothing_left(placement: Placement) -> str:
    """Return what is wrong with a mask that lets nothing count of what a placement leaves of its picture."""
    size, corner = "{}x{}".format(*placement.bucket), f"{placement.crop_left},{placement.crop_top}"
    return f"leaves nothing of what is cropped to {size} from {corner}; mend or remove it, or crop the picture less"


def look_at_mask(mask: Mask, picture: Path, size: tuple[int, int], *, decode: bool) -> MaskLook | None:
    """Return what a mask lets count of a picture; None unless it is decoded.

    size: the width and height of the upright picture. Raises PictureError if the mask cannot be used.
    """
    if not mask.is_alpha and (found := measure(mask.path, decode=False)) != size:
        what = "is {} x {} px, and {} is {} x {} px when it is upright; save the mask at that size"
        raise PictureError(what.format(*found, picture.name, *size))
    if not decode:
        return None
    grey = _grey(mask)
    return MaskLook(float(ImageStat.Stat(grey).mean[0]) / 255.0, grey.getbbox() or (0, 0, 0, 0))


def mask_levels(mask: Mask) -> np.ndarray:
    """Return how much each pixel of the upright picture counts, (height, width) from 0 to 255.

    White counts, black does not, and neither does what is transparent in the mask; an alpha channel counts as it is.
    Raises PictureError.
    """
    import numpy as np

    return np.asarray(_grey(mask))


def _grey(mask: Mask) -> Image.Image:
    try:
        image = load_upright(mask.path)
        grey = _alpha(image) if mask.is_alpha else _light(image)
    except BROKEN as error:
        raise PictureError(f"mask is damaged: {error}; replace or remove it") from error
    if not grey.getbbox():
        if mask.is_alpha:
            raise PictureError("is transparent everywhere, so that nothing of it would count; mend or remove it")
        raise PictureError("is black everywhere, so that nothing of its picture would count; mend or remove it")
    return grey


def _alpha(image: Image.Image) -> Image.Image:
    """The alpha channel, which is full where a picture has none."""
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _light(image: Image.Image) -> Image.Image:
    """The grey of a mask, black where it is transparent. Raises PictureError if it is coloured."""
    if image.mode in _SIXTEEN_BITS:
        import numpy as np

        levels = np.rint(np.asarray(image).astype(np.float64) / 257.0).clip(0, 255)
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode in ("L", "1") and not image.has_transparency_data:
        return image.convert("L")
    red, green, blue, alpha = image.convert("RGBA").split()
    black = Image.new("L", image.size, 0)
    red, green, blue = (Image.composite(channel, black, alpha) for channel in (red, green, blue))
    for other in (green, blue):
        histogram = ImageChops.difference(red, other).histogram()
        if (most := max(level for level, num in enumerate(histogram) if num)) > _NEARLY_GREY:
            what = f"is coloured (its channels differ by {most} of 255), and white counts, black does not"
            raise PictureError(f"{what}; save it in grey")
    return Image.merge("RGB", (red, green, blue)).convert("L")
