"""What `sdtrain compare` leaves: a page, a PNG with every picture, and an animation; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdtrain.errors import printable
from sdtrain.files.writer import atomic_file, write_text
from sdtrain.training.watching.grid import LABEL_PX, Rows, labelled_grid, save_picture
from sdtrain.training.watching.report.page import cut_off
from sdtrain.training.watching.report.pictures import MOST_BYTES, SIZES, encoded
from sdtrain.training.watching.report.templates import template

PAGE, GRID, ANIMATION = "compare.html", "grid.png", "animation.webp"
FRAME_MS = 800
MARGIN_PX = 110


@dataclass(frozen=True)
class Row:
    """One step of a run: what it is called, and what it draws at each strength, prompts by seeds."""

    label: str
    drawn: Sequence[Rows]


@dataclass(frozen=True)
class Comparison:
    """Steps or runs side by side, all drawn from the same noise."""

    title: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    strengths: Sequence[float]
    rows: Sequence[Row]

    def cell(self, row: Row, strength: int, prompt: int, seed: int) -> Image.Image:
        """Return one picture, by the places of its strength, prompt and seed."""
        return row.drawn[strength][prompt][seed]

    @property
    def places(self) -> list[tuple[int, int]]:
        """The places of all prompts and seeds, in their order."""
        return [(prompt, seed) for prompt in range(len(self.prompts)) for seed in range(len(self.seeds))]


@dataclass(frozen=True)
class Table:
    """One prompt and seed on the page: a row of pictures, as text, for each step or run."""

    prompt: str
    seed: int
    rows: list[tuple[str, list[str]]]


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write the three files into a folder; return the path of the page. Raises UserError when one cannot be written."""
    save_picture(sheet(comparison), folder / GRID)
    frames = animation(comparison)
    with atomic_file(folder / ANIMATION) as file:
        frames[0].save(
            file, format="WEBP", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, quality=85
        )
    write_text(folder / PAGE, page(comparison))
    return folder / PAGE


def page(comparison: Comparison) -> str:
    """Return the page as text, with as many prompts and seeds as it can bear."""
    tables, num_bytes = list[Table](), 0
    pictures = len(comparison.places) * len(comparison.rows) * len(comparison.strengths)
    longest_px, quality = _fitting(comparison, pictures)
    for prompt, seed in comparison.places:
        rows = [
            (
                printable(row.label),
                [
                    encoded(comparison.cell(row, strength, prompt, seed), longest_px, quality)
                    for strength in range(len(comparison.strengths))
                ],
            )
            for row in comparison.rows
        ]
        num_bytes += sum(len(uri) for _, uris in rows for uri in uris)
        if tables and num_bytes > MOST_BYTES:
            break
        tables.append(Table(comparison.prompts[prompt], comparison.seeds[seed], rows))
    return template(__package__, "comparison.html").render(
        title=printable(comparison.title),
        strengths=[f"{strength:g}" for strength in comparison.strengths],
        tables=tables,
        left_out=len(comparison.places) - len(tables),
        cut=cut_off,
    )


def _fitting(comparison: Comparison, pictures: int) -> tuple[int, int]:
    """Return the largest size and quality at which all pictures fit, if they are like the first."""
    first = comparison.cell(comparison.rows[-1], -1, 0, 0)
    fits = [size for size in SIZES if len(encoded(first, *size)) * pictures <= MOST_BYTES]
    return fits[0] if fits else SIZES[-1]


def sheet(comparison: Comparison) -> Image.Image:
    """Return all pictures in their full size: a block for each prompt and seed, steps downwards, strengths across."""
    width, height = comparison.cell(comparison.rows[0], 0, 0, 0).size
    block = LABEL_PX * 2 + len(comparison.rows) * (height + 2)
    across = MARGIN_PX + len(comparison.strengths) * (width + 2)
    picture = Image.new("RGB", (across, LABEL_PX + block * len(comparison.places)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    draw.text((4, 2), printable(comparison.title), fill="black", font=font)
    for number, (prompt, seed) in enumerate(comparison.places):
        top = LABEL_PX + number * block
        draw.text(
            (4, top + 2), f"seed {comparison.seeds[seed]}: {printable(comparison.prompts[prompt])}", "black", font
        )
        for column, strength in enumerate(comparison.strengths):
            place = (MARGIN_PX + column * (width + 2), top + LABEL_PX)
            draw.text((place[0] + 2, place[1] + 2), f"strength {strength:g}", "grey", font)
            for index, row in enumerate(comparison.rows):
                cell = comparison.cell(row, column, prompt, seed)
                picture.paste(cell, (place[0], place[1] + LABEL_PX + index * (height + 2)))
        for index, row in enumerate(comparison.rows):
            draw.text((4, top + 2 * LABEL_PX + index * (height + 2) + 4), printable(row.label)[:16], "black", font)
    return picture


def animation(comparison: Comparison) -> list[Image.Image]:
    """Return a frame for the base, if it was drawn, and one for each step or run at the greatest strength."""
    strengths = list(comparison.strengths)
    frames = [(row.label, row.drawn[strengths.index(max(strengths))]) for row in comparison.rows]
    if 0 in strengths:
        frames.insert(0, ("base model", comparison.rows[0].drawn[strengths.index(0)]))
    return [
        labelled_grid(rows, comparison.prompts, comparison.seeds, f"{comparison.title}: {label}")
        for label, rows in frames
    ]
