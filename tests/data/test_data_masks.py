"""Laws of masks: where they stand, what they are at latent size, and that bad ones are told all at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdtrain.config.draft import Written, draft_of
from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.batches import Batches
from sdtrain.data.buckets import Placement, bucket_sizes, place
from sdtrain.data.examples import scan_folders
from sdtrain.data.masks.area import at_latent_size
from sdtrain.data.placing import cropped_masks
from sdtrain.data.report.notes import picture_notes
from sdtrain.data.report.summary import summarise
from sdtrain.errors import UserError

Prepare = Callable[..., Batches]
MakeConfig = Callable[..., DataConfig]
BUCKETS = bucket_sizes(64, 8, 2.5)


def half(size: tuple[int, int], *, right: int = 0, left: int = 255) -> Image.Image:
    """A mask whose left half counts."""
    image = Image.new("L", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def edge(size: tuple[int, int]) -> Image.Image:
    """A mask whose first two columns count."""
    image = Image.new("L", size)
    image.paste(255, (0, 0, 2, size[1]))
    return image


def masked(folder: Path, **settings: object) -> FolderConfig:
    return FolderConfig.model_validate({"path": str(folder), "masks": "beside", **settings})


def problems_of(config: DataConfig, *, decode: bool = True) -> dict[str, str]:
    _, problems = scan_folders(config, decode=decode)
    return {Path(problem.where).name: problem.what for problem in problems}


@given(
    width=st.integers(16, 200),
    height=st.integers(16, 200),
    levels=st.sampled_from(["random", "black", "white", "half"]),
    seed=st.integers(0, 99),
)
def test_a_mask_at_latent_size_is_the_mean_over_the_area(width: int, height: int, levels: str, seed: int) -> None:
    """Against the plain definition: the mask on a grid 8 x 8 times finer than its pixels can be told from it."""
    placement = place(width, height, BUCKETS)
    random = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    whole = {
        "random": random,
        "black": np.zeros_like(random),
        "white": np.full_like(random, 255),
        "half": np.asarray(half((width, height))),
    }[levels]
    got = at_latent_size(whole, placement).numpy()
    across, down = placement.bucket[0] // 8, placement.bucket[1] // 8
    assert got.shape == (down, across)
    left, top, right, bottom = placement.source_box
    fine = 400  # samples for each latent pixel and side
    xs = np.minimum(left + (np.arange(across * fine) + 0.5) / (across * fine) * (right - left), width - 1e-6).astype(
        int
    )
    ys = np.minimum(top + (np.arange(down * fine) + 0.5) / (down * fine) * (bottom - top), height - 1e-6).astype(int)
    by_row = (whole[:, xs] / 255).reshape(height, across, fine).mean(2)
    expected = by_row[ys].reshape(down, fine, across).mean(1)
    assert np.abs(got - expected).max() < 0.02
    if levels == "black":
        assert (got == 0).all()
    if levels == "white":
        assert (got == 1).all(), "exactly: a mask of ones is no mask"
    if levels == "half":
        columns = left + np.arange(across) / across * (right - left)
        assert (got[:, columns >= width // 2] == 0).all(), "exactly: nothing is learnt there"


@pytest.mark.parametrize("width", [58, 116, 122, 230, 244])
def test_rounding_lets_no_part_of_a_pixel_in(width: int) -> None:
    """These widths are cut into 14 where a float misses the whole number in the middle by its last bit."""
    placement = Placement((width, width), (112, 112), (112, 112), 0, 0)
    for flip in (1, -1):
        levels = np.asarray(half((width, width)))[:, ::flip]
        got = at_latent_size(np.ascontiguousarray(levels), placement).numpy()[:, ::flip]
        assert (got[:, :7] == 1).all() and (got[:, 7:] == 0).all()
        assert (at_latent_size(np.ascontiguousarray(levels.T), placement).numpy()[::flip] == got.T).all()


def test_masks_stand_beside_pictures_or_in_a_folder_of_their_own(
    prepare: Prepare, config: MakeConfig, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    for number, name in enumerate(("a", "b")):
        for folder in ("beside", "apart/sub"):
            picture(tmp_path / folder / f"{name}.png", (64, 64), name, seed=number)
    half((64, 64)).save(tmp_path / "beside" / "a.mask.png")
    (tmp_path / "apart" / "masks" / "sub").mkdir(parents=True)
    half((64, 64)).save(tmp_path / "apart" / "masks" / "sub" / "a.png")
    apart = masked(tmp_path / "apart", masks="folder", mask_path=str(tmp_path / "apart" / "masks"))
    expected = torch.zeros(8, 8)
    expected[:, :4] = 1
    for folder in (masked(tmp_path / "beside"), apart):
        (batch, _), *_ = prepare(config(folder), counting.encoders()).at(0)
        assert batch.counts is not None and batch.counts.shape == (2, 8, 8)
        for example, counts in zip(batch.examples, batch.counts, strict=True):
            assert torch.equal(counts, expected if example.path.stem == "a" else torch.ones(8, 8))


@pytest.mark.parametrize("kind", ["grey", "colour", "palette", "bits", "deep", "clear"])
def test_white_counts_in_whatever_form_a_mask_is_saved(
    kind: str, prepare: Prepare, config: MakeConfig, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    picture(tmp_path / "p" / "a.png", (64, 64), "a")
    mask = half((64, 64))
    deep = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    clear = Image.merge("LA", (Image.new("L", (64, 64), 255), mask))
    forms = {"colour": mask.convert("RGB"), "palette": mask.convert("P"), "bits": mask.convert("1"), "deep": deep}
    {"grey": mask, "clear": clear, **forms}[kind].save(tmp_path / "p" / "a.mask.png")
    (batch, _), *_ = prepare(config(masked(tmp_path / "p")), counting.encoders()).at(0)
    assert batch.counts is not None
    assert (batch.counts[0, :, :4] == 1).all() and (batch.counts[0, :, 4:] == 0).all()


def test_the_alpha_channel_is_a_mask_where_it_is_asked_for(
    prepare: Prepare, config: MakeConfig, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    picture(tmp_path / "p" / "a.png", (64, 64), "a")
    picture(tmp_path / "p" / "b.png", (64, 64), "b", seed=1)
    image = Image.open(tmp_path / "p" / "a.png")
    image.putalpha(half((64, 64)))
    image.save(tmp_path / "p" / "a.png")
    (plain, _), *_ = prepare(config(tmp_path / "p"), counting.encoders()).at(0)
    (batch, _), *_ = prepare(config(masked(tmp_path / "p", masks="alpha")), counting.encoders()).at(0)
    assert plain.counts is None and torch.equal(plain.latents, batch.latents)
    assert batch.counts is not None
    by_name = dict(zip((example.path.stem for example in batch.examples), batch.counts, strict=True))
    assert (by_name["a"][:, :4] == 1).all() and (by_name["a"][:, 4:] == 0).all() and (by_name["b"] == 1).all()


def test_the_floor_counts_where_the_mask_says_less(
    prepare: Prepare, config: MakeConfig, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    picture(tmp_path / "p" / "a.png", (64, 64), "a")
    half((64, 64), right=51).save(tmp_path / "p" / "a.mask.png")
    for floor, expected in ((0.0, 0.2), (0.1, 0.2), (0.5, 0.5)):
        (batch, _), *_ = prepare(config(masked(tmp_path / "p", mask_floor=floor)), counting.encoders()).at(0)
        assert batch.counts is not None
        assert batch.counts[0, 0].tolist() == pytest.approx([1.0] * 4 + [expected] * 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_lies_on_its_picture_whatever_way_the_camera_was_held(
    orientation: int, prepare: Prepare, config: MakeConfig, tmp_path: Path, counting: Any
) -> None:
    """The bright part of the picture is what the mask leaves; both are cropped, and turned or not by EXIF."""
    folder = tmp_path / "p"
    folder.mkdir()
    upright = Image.new("L", (100, 60), 0)
    upright.paste(255, (0, 0, 40, 40))
    undo = [
        *(None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM),
        *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE),
        Image.Transpose.ROTATE_270,
    ][orientation - 1]
    lying = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying.convert("RGB").save(folder / "a.png", exif=exif)
    (folder / "a.txt").write_text("a")
    upright.save(folder / "a.mask.png")
    (upright_mask, _), *_ = prepare(config(masked(folder)), counting.encoders()).at(0)
    lying.save(folder / "a.mask.png", exif=exif)
    (turned_mask, _), *_ = prepare(config(masked(folder)), counting.encoders()).at(0)
    for batch in (upright_mask, turned_mask):
        assert batch.counts is not None
        bright = batch.latents[0, 0] / 0.3 / 2 + 0.5
        assert torch.allclose(batch.counts[0], bright, atol=0.2), "the Lanczos filter rings a little"
    assert torch.equal(upright_mask.counts, turned_mask.counts)


def test_bad_masks_are_told_in_one_round_with_bad_pictures(
    config: MakeConfig, picture: Callable[..., None], tmp_path: Path
) -> None:
    folder = tmp_path / "p"
    for number, name in enumerate(("size", "black", "junk", "red", "jpeg", "good")):
        picture(folder / f"{name}.png", (64, 48), name, seed=number)
    half((48, 64)).save(folder / "size.mask.png")
    Image.new("L", (64, 48)).save(folder / "black.mask.png")
    (folder / "junk.mask.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 48), (255, 0, 0)).save(folder / "red.mask.png")
    half((64, 48)).save(folder / "jpeg.mask.jpg")
    half((64, 48)).save(folder / "good.mask.png")
    half((64, 48)).save(folder / "alone.mask.png")
    picture(folder / "bare.png", (64, 48), None)
    told = problems_of(config(masked(folder)))
    assert "is 48 x 64 px, and size.png is 64 x 48 px" in told["size.mask.png"]
    assert "black everywhere" in told["black.mask.png"]
    assert "not a picture" in told["junk.mask.png"]
    assert "coloured" in told["red.mask.png"]
    assert "must be a PNG" in told["jpeg.mask.jpg"]
    assert "mask without a picture" in told["alone.mask.png"]
    assert "no caption" in told["bare.png"]
    assert len(told) == 7
    at_start = problems_of(config(masked(folder)), decode=False)
    assert set(told) - set(at_start) == {"black.mask.png", "red.mask.png"}, "the rest is found before encoding"


def test_masks_that_are_found_bad_while_encoding_are_told_with_the_pictures(
    prepare: Prepare, config: MakeConfig, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / "p" / f"{name}.png", (128, 40), name)
    (tmp_path / "p" / "a.png").write_bytes((tmp_path / "p" / "a.png").read_bytes()[:-400])
    Image.new("L", (128, 40)).save(tmp_path / "p" / "b.mask.png")
    edge((128, 40)).save(tmp_path / "p" / "c.mask.png")
    with pytest.raises(UserError) as error:
        prepare(config(masked(tmp_path / "p"), max_aspect=1.0), counting.encoders())
    told = {Path(problem.where).name: problem.what for problem in error.value.problems}
    assert set(told) == {"a.png", "b.mask.png", "c.mask.png"} and not counting.pictures
    assert "leaves nothing of what is cropped to 64x64" in told["c.mask.png"]


@pytest.mark.parametrize("crops", [1, 3])
def test_a_mask_whose_part_is_cropped_away_is_told_by_check_as_by_encoding(
    config: MakeConfig, picture: Callable[..., None], tmp_path: Path, crops: int
) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / "p" / f"{name}.png", (128, 40), name, seed=ord(name))
    edge((128, 40)).save(tmp_path / "p" / "a.mask.png")
    half((128, 40), right=1).save(tmp_path / "p" / "b.mask.png")
    chosen = config(masked(tmp_path / "p", crops=crops), max_aspect=1.0)
    examples, problems = scan_folders(chosen, decode=True)
    assert not problems
    told = cropped_masks(examples, chosen)
    assert [Path(one.where).name for one in told] == ["a.mask.png"]
    assert "leaves nothing of what is cropped to 64x64" in told[0].what
    assert not cropped_masks(examples, chosen.model_copy(update={"max_aspect": 4.0})), "there it is not cropped"
    assert not cropped_masks(scan_folders(chosen, decode=False)[0], chosen), "what was not read is told later"


def test_a_mask_is_not_trained_as_a_picture_unless_it_is_meant_to(
    config: MakeConfig, picture: Callable[..., None], tmp_path: Path
) -> None:
    folder = tmp_path / "p"
    picture(folder / "a.png", (64, 64), "a")
    half((64, 64)).save(folder / "a.mask.png")
    lenient = FolderConfig(path=str(folder), missing_captions="empty")
    assert 'set masks = "beside"' in problems_of(config(lenient))["a.mask.png"]
    assert not problems_of(config(lenient.model_copy(update={"exclude": ["*.mask.*"]})))
    (folder / "a.mask.txt").write_text("a drawing of a mask")
    assert not problems_of(config(lenient)), "it has a caption of its own"


def test_an_edited_mask_is_encoded_anew_and_the_picture_is_not(
    prepare: Prepare, config: MakeConfig, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    picture(tmp_path / "p" / "a.png", (64, 64), "a")
    for left in (255, 128):
        half((64, 64), left=left).save(tmp_path / "p" / "a.mask.png")
        (batch, _), *_ = prepare(config(masked(tmp_path / "p")), counting.encoders()).at(0)
        assert batch.counts is not None and batch.counts[0, 0, 0] == pytest.approx(left / 255)
    assert len(counting.pictures) == 1
    assert len(list((tmp_path / "cache" / "masks").rglob("*.safetensors"))) == 2


def test_a_mask_folder_that_is_not_there_or_says_nothing_is_told(
    config: MakeConfig, picture: Callable[..., None], tmp_path: Path
) -> None:
    picture(tmp_path / "p" / "a.png", (64, 64), "a")
    (tmp_path / "empty").mkdir()

    def told(**settings: object) -> str:
        _, problems = scan_folders(config(masked(tmp_path / "p", **settings)), decode=False)
        (problem,) = problems
        return f"{problem.where}: {problem.what}"

    assert told().startswith("data.folder[0].masks: beside, but no picture has a mask")
    assert "no such folder" in told(masks="folder", mask_path=str(tmp_path / "missing"))
    assert "no picture has a mask" in told(masks="folder", mask_path=str(tmp_path / "empty"))
    assert "of the pictures themselves" in told(masks="folder", mask_path=str(tmp_path / "p"))


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"masks": "folder"}, "masks"),
        ({"mask_path": "m"}, "mask_path"),
        ({"mask_floor": 0.5}, "mask_floor"),
        ({"masks": "alpha", "mask_floor": 1.0}, "mask_floor"),
    ],
)
def test_settings_of_masks_that_cannot_be_meant_are_refused(settings: dict[str, Any], where: str) -> None:
    table = {
        "name": "a",
        "steps": 1000,
        "model": {"path": "m"},
        "method": {"kind": "lora"},
        "data": {"folder": [{"path": "p", **settings}]},
    }
    assert [problem.where for problem in draft_of(Written("a", table, table)).problems] == [f"data.folder[0].{where}"]


@pytest.mark.parametrize(
    ("data", "validation", "where"),
    [
        ({"repeats": 0}, [], "data.folder[0].repeats"),
        ({"loss_weight": 0.0}, [], "data.folder[0].loss_weight"),
        ({"loss_weight": -1.0}, [], "data.folder[0].loss_weight"),
        ({"regularisation": True}, [], "data.folder[0].regularisation"),
        ({}, [{"path": "v", "loss_weight": 2.0}], "validation.folder[0].loss_weight"),
        ({}, [{"path": "v", "regularisation": True}], "validation.folder[0].regularisation"),
    ],
)
def test_weights_of_folders_that_cannot_be_meant_are_refused(
    data: dict[str, Any], validation: list[dict[str, Any]], where: str
) -> None:
    table = {
        "name": "a",
        "steps": 1000,
        "model": {"path": "m"},
        "method": {"kind": "lora"},
        "data": {"folder": [{"path": "p", **data}]},
        "validation": {"folder": validation},
    }
    assert [problem.where for problem in draft_of(Written("a", table, table)).problems] == [where]


def test_check_says_how_much_masks_leave(config: MakeConfig, picture: Callable[..., None], tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / "p" / f"{name}.png", (64, 64), name, seed=ord(name))
    half((64, 64)).save(tmp_path / "p" / "a.mask.png")
    tiny = Image.new("L", (64, 64))
    tiny.putpixel((30, 30), 255)
    tiny.save(tmp_path / "p" / "b.mask.png")
    chosen = config(masked(tmp_path / "p"))
    examples, problems = scan_folders(chosen, decode=True)
    assert not problems
    notes = picture_notes(examples, summarise(examples, chosen))
    assert (
        "masks: 2 of 3 pictures, which let 25% of them count on average, at least 0.0% (b.png); without, so that all "
        "of it counts: c.png" in notes
    )
    assert "nearly all masked: 1 picture: b.png 0.02%" in notes
