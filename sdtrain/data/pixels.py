"""From a picture file to the tensor that a VAE encodes: the same bits every time."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from sdtrain.data.buckets import Placement
from sdtrain.data.examples import Example
from sdtrain.data.pictures import PictureError, load_upright

# Part of every cache key: raise it when a change here changes pixels.
PIXELS_VERSION = 1

_REDUCING_GAP = 3.0  # shrinks by whole factors first while that cannot be seen: large photographs get quick


def load_pixels(example: Example, placement: Placement, content: bytes | None = None) -> Tensor:
    """Return the picture in its bucket: (3, height, width) float32 in [-1, 1], sRGB, upright, transparency on white.

    content: the bytes of its file; None: they are read here. Raises PictureError, also if the picture has changed its
    size since it was scanned.
    """
    picture = load_upright(example.path, content)
    if picture.size != placement.original:
        found, expected = (f"{width} x {height} px" for width, height in (picture.size, placement.original))
        raise PictureError(f"picture has changed while it was in use: {found}, was {expected}; start again")
    picture = _resize(_to_srgb(picture), placement)
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(127.5).sub_(1.0)


def _resize(picture: Image.Image, placement: Placement) -> Image.Image:
    """Scales to cover and crops in one go: only what lies in the bucket is computed."""
    (width, height), (scaled_width, scaled_height) = placement.original, placement.scaled
    left, top = placement.crop_left, placement.crop_top
    right, bottom = left + placement.bucket[0], top + placement.bucket[1]
    box = (
        left * width / scaled_width,
        top * height / scaled_height,
        min(width, right * width / scaled_width),
        min(height, bottom * height / scaled_height),
    )
    return picture.resize(placement.bucket, Image.Resampling.LANCZOS, box=box, reducing_gap=_REDUCING_GAP)


def _to_srgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB of any picture; what is transparent becomes white."""
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):  # PIL's own conversion would clip at 255
        levels = np.asarray(picture).astype(np.float64)
        return Image.fromarray(np.rint(levels / 257.0).clip(0, 255).astype(np.uint8)).convert("RGB")
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    colours = _apply_profile(picture)
    if alpha is None:
        return colours
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(colours, mask=alpha)
    return white


def _apply_profile(picture: Image.Image) -> Image.Image:
    """The colours as sRGB, by the picture's ICC profile if it has one that fits its kind of colours."""
    content = picture.info.get("icc_profile")
    if picture.mode not in ("RGB", "L", "CMYK"):
        picture = picture.convert("L" if picture.mode in ("1", "LA", "La") else "RGB")
    if not content:
        return picture.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        converted = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return picture.convert("RGB")  # a damaged or foreign profile: shown as if without, as viewers do
    assert converted is not None, "only an in-place conversion returns nothing"
    return converted
