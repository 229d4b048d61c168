"""The pictures of a card: those of a run's newest preview, each with what it was drawn from, as galleries read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from sdtrain.config.schema import Config
from sdtrain.errors import printable
from sdtrain.files.writer import atomic_file
from sdtrain.training.watching.grid import cells_of
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
        about = PngImagePlugin.PngInfo()
        about.add_itxt("parameters", parameters(shown, config, model))
        with atomic_file(folder / shown.path) as file:
            shown.picture.save(file, format="PNG", pnginfo=about)


def parameters(shown: Shown, config: Config, model: str) -> str:
    """Return what a picture was drawn from in A1111's form, which Civitai reads."""
    preview = config.preview
    negative = f"Negative prompt: {printable(preview.negative_prompt)}\n" if preview.negative_prompt else ""
    values = {
        "Steps": preview.num_inference_steps,
        "Sampler": "Euler",
        "CFG scale": f"{preview.guidance_scale:g}",
        "Seed": shown.seed,
        "Size": f"{preview.width_px or config.data.resolution_px}x{preview.height_px or config.data.resolution_px}",
        "Model": model,
    }
    return f"{printable(shown.prompt)}\n{negative}" + ", ".join(f"{name}: {value}" for name, value in values.items())
