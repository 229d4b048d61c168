"""Laws of views: flips, crops and resolutions, and pictures that are not enlarged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdtrain.config.draft import Written, draft_of
from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.batches import Batches, prepare_batches
from sdtrain.data.buckets import place_unscaled
from sdtrain.data.examples import Example, scan_folders
from sdtrain.data.placing import at_resolutions, placements_of, views_of
from sdtrain.data.report.steps import Steps
from sdtrain.data.report.summary import summarise

Prepare = Callable[..., Batches]
MakeConfig = Callable[..., DataConfig]


def chosen(folder: Path, **settings: object) -> FolderConfig:
    return FolderConfig.model_validate({"path": str(folder), **settings})


def example(size: tuple[int, int], **settings: Any) -> Example:
    return Example(Path("a.png"), "a", *size, repeats=1, **settings)


def test_half_of_the_time_a_picture_is_mirrored_and_its_mask_and_crop_with_it(
    prepare: Prepare, config: MakeConfig, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    picture(tmp_path / "p" / "a.png", (100, 64), "a")
    mask = Image.new("L", (100, 64), 0)
    mask.paste(255, (10, 0, 50, 64))
    mask.save(tmp_path / "p" / "a.mask.png")
    folder = chosen(tmp_path / "p", flip=True, crops=2, masks="beside")
    batches = prepare(config(folder, max_aspect=1.0, batch_size=1), counting.encoders())
    assert len(counting.pictures) == 4 and batches.num_examples == 1, "two crops, each of them twice"
    seen: Counter[bytes] = Counter()
    plain = {int(one.sizes["time_ids"][0, 3]): one for step in range(60) for one, _ in batches.at(step)}
    assert set(plain) == {0, 36}
    found: dict[bytes, tuple[torch.Tensor, torch.Tensor, int]] = {}
    for step in range(400):
        for one, _ in batches.at(step):
            key = one.latents.numpy().tobytes()
            seen[key] += 1
            found[key] = one.latents[0], one.counts[0], int(one.sizes["time_ids"][0, 3])
    assert len(seen) == 4 and all(60 < times < 140 for times in seen.values())
    for latents, counts, left in found.values():
        mirrored = latents.flip(-1).contiguous().numpy().tobytes()
        assert mirrored in {other[0].contiguous().numpy().tobytes() for other in found.values()}
        (twin,) = [other for other in found.values() if torch.equal(other[0], latents.flip(-1))]
        assert torch.equal(twin[1], counts.flip(-1)), "the mask goes with it"
        assert twin[2] == 36 - left, "and what the model is told of the crop"


def test_which_view_is_seen_follows_from_seed_and_step_and_not_from_how_a_step_is_split(
    config: MakeConfig, pictures: Path, tmp_path: Path, counting: Any
) -> None:
    data = config(chosen(pictures, flip=True, crops=3), max_aspect=1.0, batch_size=4, gradient_accumulation=2)
    examples, _ = scan_folders(data, decode=False)

    def batches(seed: int) -> Batches:
        cache = tmp_path / "cache"
        return prepare_batches(data, examples, counting.encoders(), cache=cache, seed=seed, on_progress=lambda *_: None)

    def seen(found: list[Any]) -> list[bytes]:
        return sorted(row.numpy().tobytes() for batch, _ in found for row in batch.latents)

    one, other = batches(0), batches(1)
    for step in (5, 0, 3):
        whole = seen(list(one.at(step)))
        for size in (1, 2, 3, 8):
            assert seen(list(one.at(step, size))) == whole
            shared = [pair for hand in range(3) for pair in one.at(step, size, hand=hand, hands=3)]
            assert seen(shared) == whole
    assert any(seen(list(one.at(step))) != seen(list(other.at(step))) for step in range(3))
    steps = Steps(data, examples, seed=0, captions_are_encoded_ahead=True)
    for step in range(4):
        told = [planned.placement.sizes() for batch in steps.at(step) for planned in batch]
        used = [tuple(int(one) for one in row) for batch, _ in one.at(step) for row in batch.sizes["time_ids"]]
        assert told == used, "what `view --step` shows is what is trained"


def test_without_flips_and_crops_nothing_is_drawn_and_nothing_is_encoded_again(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    plain = prepare(config(pictures), counting.encoders())
    num = len(counting.pictures)
    flipped = prepare(config(chosen(pictures, flip=True)), counting.encoders())
    assert len(counting.pictures) == 2 * num, "the pictures as they are were there"
    again = prepare(config(pictures), counting.encoders())
    assert len(counting.pictures) == 2 * num
    for step in range(6):
        for (one, _), (two, _), (three, _) in zip(plain.at(step), again.at(step), flipped.at(step), strict=True):
            assert torch.equal(one.latents, two.latents)
            assert (one.examples, one.captions) == (two.examples, two.captions)
            assert [each.path for each in three.examples] == [each.path for each in one.examples]


@given(width=st.integers(16, 300), height=st.integers(16, 300), crops=st.integers(1, 7), flip=st.booleans())
def test_crops_lie_in_the_picture_from_one_end_to_the_other(width: int, height: int, crops: int, flip: bool) -> None:
    config = DataConfig(folder=[FolderConfig(path="a")], resolution_px=64, bucket_step_px=8, max_aspect=1.5)
    one = example((width, height), crops=crops, flip=flip)
    (placement,) = placements_of([one], config)
    views = views_of(one, placement)
    assert len(views) == len(set(views)) <= crops * (2 if flip else 1)
    slack = [placement.scaled[side] - placement.bucket[side] for side in (0, 1)]
    places = [(view.crop_left, view.crop_top) for view in views]
    assert all(0 <= left <= slack[0] and 0 <= top <= slack[1] for left, top in places)
    if crops == 1:
        assert views[0] == placement
    else:
        assert min(places) == (0, 0) and max(places) == tuple(slack)
    assert sum(view.flipped for view in views) * 2 == (len(views) if flip else 0)


@given(
    width=st.integers(16, 3000), height=st.integers(16, 3000), step=st.sampled_from([8, 64]), aspect=st.floats(1.0, 4.0)
)
def test_a_picture_is_not_enlarged_unless_it_is_smaller_than_a_step(
    width: int, height: int, step: int, aspect: float
) -> None:
    placement = place_unscaled(width, height, step, aspect)
    across, down = placement.bucket
    assert across % step == down % step == 0 and max(across, down) <= max(aspect, 1) * min(across, down)
    if min(width, height) >= step:
        assert placement.upscale <= 1 and across <= width and down <= height
        if aspect == 4.0 and max(width, height) < 4 * min(width, height) - 4 * step:
            assert width - across < step and height - down < step, "and it is as large as that allows"


def test_small_pictures_go_into_small_buckets_where_they_are_not_enlarged(
    config: MakeConfig, picture: Callable[..., None], tmp_path: Path
) -> None:
    for name, size in {"small": (30, 41), "large": (200, 200), "alone": (50, 50)}.items():
        picture(tmp_path / "p" / f"{name}.png", size, name)
    for settings in ({}, {"ragged": "merge"}):
        data = config(tmp_path / "p", enlarge=False, **settings)
        examples, _ = scan_folders(data, decode=False)
        placements = dict(zip((one.path.stem for one in examples), placements_of(examples, data), strict=True))
        assert placements["large"].bucket == (64, 64) or settings
        assert not summarise(examples, data).upscales
        assert placements["small"].bucket == (24, 40)
    assert summarise(examples, config(tmp_path / "p")).upscales


def test_a_picture_is_seen_at_every_resolution_of_its_folder(
    config: MakeConfig, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    for number in range(3):
        picture(tmp_path / "two" / f"{number}.png", (128, 128), "a", seed=number)
        picture(tmp_path / "own" / f"{number}.png", (128, 128), "a", seed=9 + number)
        picture(tmp_path / "plain" / f"{number}.png", (128, 128), "a", seed=20 + number)
    folders = [chosen(tmp_path / "two", resolutions_px=[64, 128]), chosen(tmp_path / "own", resolutions_px=[96])]
    data = config(*folders, tmp_path / "plain")
    scanned, _ = scan_folders(data, decode=False)
    examples = at_resolutions(scanned, [folder.resolutions_px for folder in data.folder])
    batches = prepare_batches(
        data, examples, counting.encoders(), cache=tmp_path / "cache", seed=0, on_progress=lambda *_: None
    )
    seen = Counter(
        (one.path.parent.name, batch.latents.shape[-1] * 8)
        for step in range(round(batches.steps_per_epoch))
        for batch, _ in batches.at(step)
        for one in batch.examples
    )
    assert seen == {("two", 64): 3, ("two", 128): 3, ("own", 96): 3, ("plain", 64): 3}
    report = summarise(examples, data)
    assert (report.num_pictures, report.num_images) == (9, 12)


def test_pictures_below_the_smallest_size_are_told_all_at_once(
    config: MakeConfig, picture: Callable[..., None], tmp_path: Path
) -> None:
    for name, size in {"a": (60, 200), "b": (64, 64), "c": (200, 63)}.items():
        picture(tmp_path / "p" / f"{name}.png", size, name)
    _, problems = scan_folders(config(tmp_path / "p", min_side_px=64), decode=False)
    assert [Path(problem.where).name for problem in problems] == ["a.png", "c.png"]
    assert "is 60 x 200 px, and data.min_side_px = 64" in problems[0].what


@pytest.mark.parametrize(
    ("data", "validation", "where"),
    [
        ({"resolutions_px": [64, 64]}, {}, "data.folder[0].resolutions_px"),
        ({"resolutions_px": [128, 64]}, {}, "data.folder[0].resolutions_px"),
        ({"crops": 0}, {}, "data.folder[0].crops"),
        ({}, {"flip": True}, "validation.folder[0].flip"),
        ({}, {"crops": 2}, "validation.folder[0].crops"),
        ({}, {"resolutions_px": [512, 1024]}, "validation.folder[0].resolutions_px"),
    ],
)
def test_views_that_cannot_be_meant_are_refused(data: dict[str, Any], validation: dict[str, Any], where: str) -> None:
    table = {
        "name": "a",
        "steps": 1000,
        "model": {"path": "m"},
        "method": {"kind": "lora"},
        "data": {"bucket_step_px": 96, "folder": [{"path": "p", **data}]},
        "validation": {"folder": [{"path": "v", **validation}]},
    }
    problems = draft_of(Written("a", table, table)).problems
    assert {problem.where for problem in problems} == {where}
