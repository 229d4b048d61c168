"""The pictures of a card: those of a run's newest preview, each with what it was drawn from, as galleries read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdtrain.commands.publish.parameters import parameters
from sdtrain.config.schema import Config
from sdtrain.training.watching.grid import cells_of, save_picture
from sdtrain.training.watching.report.pictures import preview_files

MOST_PICTURES = 12
"""The most pictures of a card."""


@dataclass(frozen=True)
class Shown:
    """One picture of a card. path: its place in the folder."""

    prompt: str
    seed: str
    path: str
    picture: Image.Image


def gallery_of(run: Path, step: int) -> list[Shown]:
    """Return the pictures of a run's newest preview up to a step, row by row; none where it has no previews."""
    files = [path for number, path in preview_files(run / "previews") if number <= step]
    cells = cells_of(files[-1], MOST_PICTURES) if files else []
    return [
        Shown(cell.prompt, cell.seed, f"images/{number:02d}.png", cell.picture) for number, cell in enumerate(cells)
    ]


def write_gallery(folder: Path, pictures: Sequence[Shown], config: Config, model: str) -> None:
    """Write the pictures, with the words that Civitai and web interfaces look for in a PNG. Raises UserError."""
    for shown in pictures:
        words = parameters(shown.prompt, shown.seed, config, model)
        save_picture(shown.picture, folder / shown.path, parameters=words)
