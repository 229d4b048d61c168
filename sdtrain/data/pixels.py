"""From a picture file to the tensor that a VAE encodes: the same bits every time."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdtrain.data.buckets import Placement
from sdtrain.data.colours import to_srgb
from sdtrain.data.examples import Example
from sdtrain.data.pictures import PictureError, load_upright

# Part of every cache key: raise it when a change here changes pixels.
PIXELS_VERSION = 1

_REDUCING_GAP = 3.0  # shrinks by whole factors first while that cannot be seen: large photographs get quick


def load_pixels(example: Example, placement: Placement) -> Tensor:
    """Return the picture in its bucket: (3, height, width) float32 in [-1, 1], sRGB, upright, transparency on white.

    Raises PictureError, also if the file has changed its size since it was scanned.
    """
    picture = load_upright(example.path)
    if picture.size != placement.original:
        found, expected = (f"{width} x {height} px" for width, height in (picture.size, placement.original))
        raise PictureError(f"picture has changed while it was in use: {found}, was {expected}; start again")
    picture = _resize(to_srgb(picture), placement)
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(127.5).sub_(1.0)


def _resize(picture: Image.Image, placement: Placement) -> Image.Image:
    """Scales to cover and crops in one go, then flips: only what lies in the bucket is computed."""
    scaled = picture.resize(
        placement.bucket, Image.Resampling.LANCZOS, box=placement.source_box, reducing_gap=_REDUCING_GAP
    )
    return scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if placement.flipped else scaled
