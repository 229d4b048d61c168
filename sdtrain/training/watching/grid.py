"""A grid of pictures to look at: prompts by seeds, each beside what the base model draws."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sdtrain.files.writer import atomic_file

LABEL_PX = 18
SMALLEST_CELL_PX = 128
DRAWN_BY = "sdtrain preview"
"""The key of the text in the base's PNG that says what it was drawn from."""

CELLS = "sdtrain cells"
"""The key of the text in a grid's PNG that says where each picture of it stands, so that it can be cut out again."""

UNREADABLE = (OSError, SyntaxError, ValueError, KeyError, TypeError, Image.DecompressionBombError)
"""What reading a grid raises that is damaged, or none of ours."""

Rows = Sequence[Sequence[Image.Image]]
"""Pictures of one size: a row for each prompt, a column for each seed."""


@dataclass(frozen=True)
class Compared:
    """What stands beside the pictures of a grid, and the words over both."""

    rows: Rows
    before: str
    now: str


def labelled_grid(
    rows: Rows, prompts: Sequence[str], seeds: Sequence[int], title: str, beside: Compared | None = None
) -> Image.Image:
    """Return the pictures in a grid, with the prompt above each row and the seed above each picture.

    Where each picture stands is told in the grid's `info`, which its PNG keeps.

    beside: pictures of the same prompts and seeds that are shown to the left of each.
    """
    shown = 2 if beside else 1
    scale = max(1, -(-SMALLEST_CELL_PX // min(rows[0][0].size)))
    width, height = rows[0][0].width * scale, rows[0][0].height * scale
    font = ImageFont.load_default(size=12)
    across = width * shown * len(seeds)
    folded = [textwrap.wrap(prompt, max(12, across // 7)) or ["(empty prompt)"] for prompt in prompts]
    total = LABEL_PX + sum(height + LABEL_PX * (len(lines) + 1) for lines in folded)
    grid = Image.new("RGB", (across, total), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((4, 2), title, fill="black", font=font)
    top = LABEL_PX
    corners = []
    for row, lines in enumerate(folded):
        for line in lines:
            draw.text((4, top + 2), line, fill="black", font=font)
            top += LABEL_PX
        labels = [f"seed {seed}" for seed in seeds]
        pictures = list(rows[row])
        if beside:
            labels = list(chain(*([f"{label}, {beside.before}", beside.now] for label in labels)))
            pictures = list(chain(*zip(beside.rows[row], pictures, strict=True)))
        for column, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            draw.text((column * width + 4, top + 2), label, fill="grey", font=font)
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (column * width, top + LABEL_PX))
        corners.append([[column * width, top + LABEL_PX] for column in range(shown - 1, len(pictures), shown)])
        top += LABEL_PX + height
    grid.info[CELLS] = json.dumps(
        {"prompts": list(prompts), "seeds": list(seeds), "size": [width, height], "corners": corners}
    )
    return grid


def save_picture(picture: Image.Image, path: Path, text: str = "", parameters: str = "") -> None:
    """Write a PNG whole or not at all.

    text: what it was drawn from, which is kept in it for ourselves. parameters: the same in A1111's form, for others.
    """
    about = PngImagePlugin.PngInfo()
    if parameters:
        about.add_itxt("parameters", parameters)
    if text:
        about.add_itxt(DRAWN_BY, text)
    if CELLS in picture.info:
        about.add_itxt(CELLS, picture.info[CELLS])
    with atomic_file(path) as file:
        picture.save(file, format="PNG", pnginfo=about)


def keep_base(rows: Rows, path: Path, drawn_by: Mapping[str, Any]) -> None:
    """Write what the base model draws as one PNG, with what it was drawn from: prompts, seeds, how it was sampled."""
    width, height = rows[0][0].size
    joined = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            joined.paste(picture, (column * width, row * height))
    save_picture(joined, path, json.dumps(drawn_by))


def kept_base(path: Path, drawn_by: Mapping[str, Any], num_rows: int, num_columns: int) -> Rows | None:
    """Return what the base model drew; None where that is not there or was drawn from other prompts or otherwise."""
    try:
        with Image.open(path) as joined:
            if getattr(joined, "text", {}).get(DRAWN_BY) != json.dumps(drawn_by):
                return None
            joined.load()
            width, height = joined.width // num_columns, joined.height // num_rows
            return [
                [
                    joined.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
                    for column in range(num_columns)
                ]
                for row in range(num_rows)
            ]
    except (OSError, SyntaxError):  # not there, or damaged: the previews can do without
        return None


@dataclass(frozen=True)
class Cell:
    """One picture of a grid."""

    prompt: str
    seed: str
    picture: Image.Image


def cells_of(path: Path, most: int) -> list[Cell]:
    """Return the first pictures of a grid, row by row; none where the file cannot be read as one."""
    try:
        return list(cut(path, most))
    except UNREADABLE:
        return []


def cut(path: Path, most: int) -> Iterator[Cell]:
    """Yield the pictures of a grid, or of the base's file; of a grid without words on its places the whole.

    Raises one of UNREADABLE.
    """
    with Image.open(path) as grid:
        grid.load()
        text = getattr(grid, "text", {})
        if CELLS in text:
            told = json.loads(text[CELLS])
            width, height = told["size"]
            places = [
                (prompt, seed, x, y)
                for prompt, row in zip(told["prompts"], told["corners"], strict=True)
                for seed, (x, y) in zip(told["seeds"], row, strict=True)
            ]
        elif DRAWN_BY in text:
            told = json.loads(text[DRAWN_BY])
            prompts, seeds = told["prompts"], told["seeds"]
            width, height = grid.width // len(seeds), grid.height // len(prompts)
            places = [
                (prompt, seed, column * width, row * height)
                for row, prompt in enumerate(prompts)
                for column, seed in enumerate(seeds)
            ]
        else:
            yield Cell("", "", grid.convert("RGB"))
            return
        for prompt, seed, x, y in places[:most]:
            yield Cell(str(prompt), str(seed), grid.crop((x, y, x + width, y + height)).convert("RGB"))
