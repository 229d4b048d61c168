"""Laws of the buckets and of how pictures go into them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.data.buckets import bucket_sizes, place

Setting = tuple[int, int, float]
sides = st.integers(1, 20_000)


@st.composite
def settings(draw: st.DrawFn) -> Setting:
    step_px = draw(st.sampled_from([8, 16, 32, 64, 128]))
    return draw(st.integers(step_px, 2048)), step_px, draw(st.floats(1.0, 4.0))


@given(settings())
def test_every_bucket_is_a_multiple_of_the_step_within_area_and_aspect(setting: Setting) -> None:
    resolution_px, step_px, max_aspect = setting
    for width, height in bucket_sizes(*setting):
        assert width % step_px == 0 and height % step_px == 0 and width > 0 and height > 0
        assert width * height <= resolution_px**2
        assert max(width, height) <= max_aspect * min(width, height)


@given(settings())
def test_the_square_is_always_a_bucket_and_every_bucket_has_its_mirror_image(setting: Setting) -> None:
    sizes = bucket_sizes(*setting)
    square = setting[0] // setting[1] * setting[1]
    assert (square, square) in sizes
    assert sorted((height, width) for width, height in sizes) == sizes
    assert len(set(sizes)) == len(sizes)


@given(settings())
def test_each_bucket_but_the_square_is_as_large_as_one_of_its_sides_allows(setting: Setting) -> None:
    resolution_px, step_px, _ = setting
    for width, height in bucket_sizes(*setting):
        grown = max((width + step_px) * height, width * (height + step_px))
        assert grown > resolution_px**2 or width == height


def test_sdxl_buckets_at_1024_px_are_the_usual_ones() -> None:
    sizes = bucket_sizes(1024, 64, 2.5)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (1536, 640), (640, 1536)} <= set(sizes)


def test_a_step_larger_than_the_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        bucket_sizes(64, 128, 2.0)


@given(sides, sides, settings())
def test_every_picture_covers_its_bucket_and_is_cropped_around_the_centre(w: int, h: int, setting: Setting) -> None:
    placement = place(w, h, bucket_sizes(*setting))
    for scaled, bucket, offset in zip(
        placement.scaled, placement.bucket, (placement.crop_left, placement.crop_top), strict=True
    ):
        assert scaled >= bucket
        assert offset >= 0 and offset + bucket <= scaled
        assert abs((scaled - bucket) - 2 * offset) <= 1
    assert placement.bucket[0] == placement.scaled[0] or placement.bucket[1] == placement.scaled[1]
    assert 0 <= placement.cropped_share < 1


@given(sides, sides, settings())
def test_no_other_bucket_has_a_nearer_aspect_ratio(w: int, h: int, setting: Setting) -> None:
    sizes = bucket_sizes(*setting)
    chosen = place(w, h, sizes).bucket

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(w / h) - math.log(size[0] / size[1]))

    assert distance(chosen) <= min(distance(size) for size in sizes) + 1e-9


@given(sides, sides, settings())
def test_the_place_does_not_depend_on_the_order_of_the_buckets(w: int, h: int, setting: Setting) -> None:
    sizes = bucket_sizes(*setting)
    assert place(w, h, sizes) == place(w, h, reversed(sizes))


@given(sides, settings())
def test_a_square_picture_goes_into_the_largest_square(side: int, setting: Setting) -> None:
    placement = place(side, side, bucket_sizes(*setting))
    assert placement.bucket[0] == placement.bucket[1] == setting[0] // setting[1] * setting[1]
    assert placement.cropped_share == 0


def test_equally_near_buckets_are_told_apart_by_area_and_then_by_width() -> None:
    assert place(100, 100, [(32, 32), (64, 64)]).bucket == (64, 64)
    assert place(100, 100, [(32, 64), (64, 32)]).bucket == (64, 32)


def test_sizes_are_in_sdxls_order() -> None:
    placement = place(200, 100, [(64, 64)])
    assert placement.scaled == (128, 64)
    assert placement.sizes() == (100, 200, 0, 32, 64, 64)


def test_upscale_is_above_one_only_when_pixels_are_invented() -> None:
    assert place(32, 32, [(64, 64)]).upscale == 2.0
    assert place(128, 128, [(64, 64)]).upscale == 0.5
