"""The colours of a picture as models see them: 8-bit sRGB, on white; no torch."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms


def to_srgb(picture: Image.Image) -> Image.Image:
    """Return any picture as 8-bit sRGB, by its ICC profile if it has one; what is transparent becomes white."""
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
    if picture.mode == "P" and picture.has_transparency_data:
        picture = picture.convert("RGBA")  # the same colours, and PIL does not warn
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
