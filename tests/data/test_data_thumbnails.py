"""Small pictures look as the model sees the large ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.buckets import bucket_sizes, place
from sdtrain.data.examples import Example
from sdtrain.data.pictures import load_small, load_upright, measure
from sdtrain.data.report.thumbnails import LONGEST_PX, Thumbnail, thumbnail


def small(path: Path, mask: Image.Image | None = None) -> Thumbnail:
    width, height = measure(path, decode=False)
    placement = place(width, height, bucket_sizes(256, 64, 2.5))
    return thumbnail(Example(path, "", width, height, 1), placement, lambda _: mask)


def halves(size: tuple[int, int]) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, (0, 0, 200))
    image.paste((200, 0, 0), (0, 0, size[0] // 2, size[1]))
    return image


@pytest.mark.parametrize("size", [(2000, 1000), (400, 3000), (300, 200), (16, 16), (4000, 17)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_small_picture_is_upright_and_has_the_shape_of_the_large_one(
    tmp_path: Path, size: tuple[int, int], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves(size).save(tmp_path / "a.jpg", quality=95, subsampling=0, exif=exif)
    whole, image = load_upright(tmp_path / "a.jpg"), small(tmp_path / "a.jpg").image
    share = min(1.0, LONGEST_PX / max(whole.size))
    assert image.size == tuple(max(1, round(side * share)) for side in whole.size)
    expected = whole.resize(image.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)).mean() < 6


def test_a_jpeg_is_read_no_smaller_than_asked(tmp_path: Path) -> None:
    halves((1601, 900)).save(tmp_path / "a.jpg")
    for longest in (100, 480, 801, 1601, 5000):
        assert min(longest, 1601) <= max(load_small(tmp_path / "a.jpg", longest).size) <= 1601
    assert max(load_small(tmp_path / "a.jpg", 480).size) < 1601


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (500, 400), (255, 0, 255, 0))
    clear.paste((10, 10, 10, 255), (0, 0, 250, 400))
    clear.convert(mode).save(tmp_path / "a.png")
    image = small(tmp_path / "a.png").image
    assert image.mode == "RGB"
    assert image.getpixel((310, 100)) == (255, 255, 255)
    assert max(image.getpixel((10, 100))) < 40  # type: ignore[type-var,arg-type]


def test_what_a_mask_leaves_out_is_tinted_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    halves((640, 480)).save(tmp_path / "a.png")
    plain = np.asarray(small(tmp_path / "a.png").image)
    mask = Image.new("L", (64, 48), 255)
    mask.paste(0, (0, 0, 32, 48))
    masked = np.asarray(small(tmp_path / "a.png", mask).image)
    assert (masked[:, 160:] == plain[:, 160:]).all()
    assert (masked[:, :160] != plain[:, :160]).any(axis=2).all()
    everything = np.asarray(small(tmp_path / "a.png", Image.new("L", (1, 1), 255)).image)
    assert (everything == plain).all(), "a mask of ones is no mask"
