"""Laws of opening pictures and of what becomes of their colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from sdtrain.data.buckets import Placement, place
from sdtrain.data.examples import Example
from sdtrain.data.pictures import PictureError, load_upright, measure
from sdtrain.data.pixels import load_pixels

SIDE = 64


def load(path: Path, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """The pixels of a picture in a bucket of its own size."""
    example, placement = Example(path, "", *size, 1), Placement(size, size, size, 0, 0)
    pixels = load_pixels(example, placement)
    assert torch.equal(pixels, load_pixels(example, placement, path.read_bytes())), "the same from bytes"
    return pixels


def levels(pixels: Tensor) -> Tensor:
    """Back to 0..255."""
    return ((pixels + 1) * 127.5).round().to(torch.int64)


def gradient(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Red grows to the right, green downwards: every orientation looks different."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 40)], axis=-1).astype(np.uint8))


def test_pixels_are_the_files_values_between_minus_one_and_one(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    pixels = load(tmp_path / "a.png")
    assert pixels.shape == (3, SIDE, SIDE) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels.min() == -1.0 and pixels.max() == 1.0
    assert torch.equal(levels(pixels), torch.from_numpy(np.array(gradient())).permute(2, 0, 1).long())


def test_loading_twice_gives_the_same_bits(tmp_path: Path) -> None:
    gradient(301, 203).save(tmp_path / "a.jpg")
    placement = place(301, 203, [(128, 96)])
    example = Example(tmp_path / "a.jpg", "", 301, 203, 1)
    assert torch.equal(load_pixels(example, placement), load_pixels(example, placement))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright_in_every_format(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that a camera held like this applies
    upright = gradient(48, 32)
    lying = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    lying.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert measure(path, decode=False) == measure(path, decode=True) == (48, 32)
    difference = np.asarray(load_upright(path), dtype=int) - np.asarray(upright, dtype=int)
    assert np.abs(difference).mean() < (4 if suffix == "jpg" else 0.001)
    assert load_upright(path, path.read_bytes()) == load_upright(path)


def test_exif_that_a_png_has_after_its_pixels_counts_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient(48, 32).save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    chunk, without, tail = content[start:end], content[:start] + content[end:-12], content[-12:]
    (tmp_path / "late.png").write_bytes(without + chunk + tail)
    for decode in (False, True):
        assert measure(tmp_path / "late.png", decode=decode) == measure(tmp_path / "a.png", decode=decode) == (32, 48)
    assert load_upright(tmp_path / "late.png").size == (32, 48)
    assert load_upright(tmp_path / "late.png", (tmp_path / "late.png").read_bytes()).size == (32, 48)


def test_a_damaged_exif_block_counts_as_upright(tmp_path: Path) -> None:
    gradient(48, 32).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00not a block at all")
    assert measure(tmp_path / "a.jpg", decode=True) == (48, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (SIDE, SIDE), (200, 10, 30, 255))
    picture.paste((0, 0, 0, 0), (0, 0, SIDE // 2, SIDE))
    if mode in ("P", "PA"):
        paletted = Image.new("P", (SIDE, SIDE), 1)
        paletted.putpalette([0, 0, 0, 200, 10, 30])
        paletted.paste(0, (0, 0, SIDE // 2, SIDE))
        paletted.save(tmp_path / "a.png", transparency=0)
    else:
        picture.convert(mode).save(tmp_path / "a.png")
    seen = levels(load(tmp_path / "a.png"))
    assert torch.all(seen[:, :, : SIDE // 2] == 255)
    assert torch.all(seen[:, :, SIDE // 2 :] < 255)


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert torch.all((levels(load(tmp_path / "a.png")) - 127).abs() <= 1)


def test_a_transparent_colour_of_an_rgb_png_becomes_white(tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE), (9, 8, 7)).save(tmp_path / "a.png", transparency=(9, 8, 7))
    assert torch.all(levels(load(tmp_path / "a.png")) == 255)


def test_sixteen_bit_greys_keep_their_tones(tmp_path: Path) -> None:
    tones = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(tones).save(tmp_path / name)
        seen = levels(load(tmp_path / name))
        assert torch.equal(seen[0], torch.from_numpy(np.rint(tones / 257.0)).long())
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("mode", ["L", "1"])
def test_greys_and_black_and_white_become_equal_channels(tmp_path: Path, mode: str) -> None:
    gradient().convert(mode).save(tmp_path / "a.png")
    seen = levels(load(tmp_path / "a.png"))
    assert torch.equal(seen[0], torch.from_numpy(np.array(gradient().convert(mode).convert("L"))).long())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_looks_like_the_rgb_it_was_made_of(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (SIDE, SIDE), (250, 120, 20)).convert("CMYK").save(tmp_path / name)
    assert torch.all((levels(load(tmp_path / name)) - torch.tensor([250, 120, 20])[:, None, None]).abs() <= 6)


def test_an_srgb_profile_changes_next_to_nothing_and_a_foreign_one_is_left_out(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gradient().save(tmp_path / "plain.png")
    gradient().save(tmp_path / "srgb.png", icc_profile=srgb)
    gradient().save(tmp_path / "damaged.png", icc_profile=b"not a profile")
    gradient().convert("L").save(tmp_path / "grey.png", icc_profile=srgb)  # of another kind of colours
    plain = levels(load(tmp_path / "plain.png"))
    assert (levels(load(tmp_path / "srgb.png")) - plain).abs().max() <= 2
    assert torch.equal(levels(load(tmp_path / "damaged.png")), plain)
    assert load(tmp_path / "grey.png").shape == (3, SIDE, SIDE)


def test_a_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"  # its red is sRGB's green
    Image.new("RGB", (SIDE, SIDE), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=bytes(profile))
    red_level, green_level, _ = levels(load(tmp_path / "a.png"))[:, 0, 0].tolist()
    assert green_level > 200 > red_level


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "RGBX", "RGB"])
def test_rarer_kinds_of_colours_in_a_tiff_are_read(tmp_path: Path, mode: str) -> None:
    orange = Image.new("RGB", (SIDE, SIDE), (250, 120, 20))
    if mode == "LAB":
        orange = ImageCms.profileToProfile(
            orange, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    orange.convert(mode).save(tmp_path / "a.tif")
    assert torch.all((levels(load(tmp_path / "a.tif")) - torch.tensor([250, 120, 20])[:, None, None]).abs() <= 6)


def test_scaling_and_cropping_in_one_go_is_scaling_then_cropping(tmp_path: Path) -> None:
    gradient(300, 200).save(tmp_path / "a.png")
    placement = place(300, 200, [(96, 96)])
    whole = gradient(300, 200).resize(placement.scaled, Image.Resampling.LANCZOS)
    left, top = placement.crop_left, placement.crop_top
    expected = np.asarray(whole.crop((left, top, left + 96, top + 96)), dtype=int)
    seen = levels(load_pixels(Example(tmp_path / "a.png", "", 300, 200, 1), placement)).permute(1, 2, 0).numpy()
    assert np.abs(seen - expected).max() <= 2


def test_a_very_long_picture_needs_no_memory_for_what_is_cropped(tmp_path: Path) -> None:
    gradient(20_000, 16).save(tmp_path / "a.png")
    placement = place(20_000, 16, [(640, 256)])
    assert placement.scaled[0] * placement.scaled[1] > 50_000_000
    assert load_pixels(Example(tmp_path / "a.png", "", 20_000, 16, 1), placement).shape == (3, 256, 640)


def test_animations_pages_and_32_bit_pictures_are_refused_by_their_names(tmp_path: Path) -> None:
    frames = [gradient(), gradient().transpose(Image.Transpose.ROTATE_90)]
    for name, what in {"a.gif": "animation", "a.webp": "animation", "a.png": "animation", "a.tif": "pages"}.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(PictureError, match=what):
            measure(tmp_path / name, decode=False)
    Image.fromarray(np.zeros((SIDE, SIDE), dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(PictureError, match="32 bits"):
        measure(tmp_path / "f.tif", decode=False)


def test_a_photograph_with_a_second_picture_inside_is_its_first(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[gradient(32, 32)])
    assert measure(tmp_path / "a.jpg", decode=True) == (SIDE, SIDE)
    assert load(tmp_path / "a.jpg").shape == (3, SIDE, SIDE)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, about strange TIFF tags
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif"])
def test_damage_is_never_a_traceback(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    gradient(40, 40).save(path)
    content, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        for place_ in random.integers(0, len(content), 4):
            damaged[place_] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(1, len(content))] if random.random() < 0.4 else damaged)
        try:
            measure(path, decode=True)
        except PictureError as error:
            assert str(tmp_path) not in str(error)
