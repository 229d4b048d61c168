"""The grid of previews: what a person sees, and what it stands beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sdtrain.training.watching.grid import LABEL_PX, Compared, keep_base, kept_base, labelled_grid

SIDE = 128
COLOURS = ("red", "green", "blue", "yellow")


def rows_of(*colours: str) -> list[list[Image.Image]]:
    """Two rows of two plain pictures."""
    pictures = [Image.new("RGB", (SIDE, SIDE), colour) for colour in colours]
    return [pictures[:2], pictures[2:]]


def cell(grid: Image.Image, row: int, column: int) -> tuple[int, int, int]:
    """The colour in the middle of a cell; a row has one line of prompt and one of labels above it."""
    top = LABEL_PX + row * (SIDE + 2 * LABEL_PX) + 2 * LABEL_PX
    found = grid.getpixel((column * SIDE + SIDE // 2, top + SIDE // 2))
    assert isinstance(found, tuple)
    return found[0], found[1], found[2]


def plain(colour: str) -> tuple[int, int, int]:
    found = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    assert isinstance(found, tuple)
    return found[0], found[1], found[2]


def test_each_picture_stands_beside_what_the_base_draws_for_its_prompt_and_seed() -> None:
    beside = Compared(rows_of("white", "black", "grey", "pink"), "base", "step 4")
    grid = labelled_grid(rows_of(*COLOURS), ["a", "b"], [0, 1], "title", beside)
    expected = [["white", "red", "black", "green"], ["grey", "blue", "pink", "yellow"]]
    for row, colours in enumerate(expected):
        assert [cell(grid, row, column) for column in range(4)] == [plain(colour) for colour in colours]


DRAWN_BY = {"prompts": ("a", "b"), "seeds": [0, 1]}


def test_what_the_base_draws_is_kept_bit_for_bit(tmp_path: Path) -> None:
    rows = [[Image.effect_noise((SIDE, 96), 40 + 7 * r + c).convert("RGB") for c in range(2)] for r in range(2)]
    keep_base(rows, tmp_path / "base.png", DRAWN_BY)
    kept = kept_base(tmp_path / "base.png", DRAWN_BY, 2, 2)
    assert kept is not None
    assert [[one.tobytes() for one in row] for row in kept] == [[one.tobytes() for one in row] for row in rows]


@pytest.mark.parametrize("damage", ["missing", "other prompts", "cut", "not a picture", "no text"])
def test_a_base_that_does_not_fit_is_left_out(tmp_path: Path, damage: str) -> None:
    path, asked = tmp_path / "base.png", DRAWN_BY
    if damage != "missing":
        noise = [[Image.effect_noise((SIDE, SIDE), 40).convert("RGB")] * 2] * 2
        keep_base(noise, path, DRAWN_BY)
    match damage:
        case "other prompts":
            asked = DRAWN_BY | {"prompts": ("a", "c")}
        case "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "not a picture":
            path.write_text("no picture")
        case "no text":
            Image.new("RGB", (SIDE, SIDE)).save(path)
    assert kept_base(path, asked, 2, 2) is None


def test_a_run_shows_the_base_beside_its_previews_also_when_it_was_resumed(
    train: Callable[..., tuple[Path, str]],
) -> None:
    settings = {"preview.every": 2, "preview.width_px": 64, "preview.height_px": 64, "preview.seeds": [0, 1]}
    run, _ = train(settings | {"steps": 2})
    train(settings | {"steps": 4}, resume=True)
    first = Image.open(run / "previews" / "step-000000.png")
    for step in (2, 4):
        later = Image.open(run / "previews" / f"step-{step:06d}.png")
        assert later.size == (2 * first.width, first.height)
        for column in range(2):
            box = (SIDE * column, 3 * LABEL_PX, SIDE * (column + 1), 3 * LABEL_PX + SIDE)
            beside = later.crop((2 * box[0], box[1], 2 * box[0] + SIDE, box[3]))
            assert beside.tobytes() == first.crop(box).tobytes(), f"step {step}, seed {column}: the base is on the left"


def test_base_pictures_of_other_prompts_are_not_shown(train: Callable[..., tuple[Path, str]]) -> None:
    run, _ = train({"preview.every": 2, "steps": 2})
    first = Image.open(run / "previews" / "step-000000.png")
    (run / "previews" / "base.png").unlink()
    train({"preview.every": 2, "steps": 4}, resume=True)
    assert Image.open(run / "previews" / "step-000004.png").size == first.size
