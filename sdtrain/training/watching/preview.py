"""Draws pictures to look at while training: a labelled grid of prompts by seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sdtrain.config.schema import Config
from sdtrain.files.writer import atomic_file
from sdtrain.models.model import Model, SamplingSettings
from sdtrain.models.sampling import sample
from sdtrain.training.run import generator_of

PICTURES_AT_ONCE = 4
LABEL_PX = 18
SMALLEST_CELL_PX = 128


@dataclass(frozen=True)
class Prompts:
    """The prompts to preview.

    encoded: their positive and negative conditioning, computed once; None where the text encoders are trained.
    """

    texts: tuple[str, ...]
    negative: str
    encoded: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None

    def conditioning(self, model: Model) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the positive and the negative conditioning of all prompts, with the text encoders as they are now."""
        return self.encoded or _encode(model, self.texts, self.negative)


def prepare_prompts(model: Model, config: Config, *, trains_text: bool) -> Prompts:
    """Return the preview prompts of a run; they are encoded now unless the text encoders will change."""
    texts = tuple(config.preview.prompts)
    encoded = None if trains_text or not texts else _encode(model, texts, config.preview.negative_prompt)
    return Prompts(texts, config.preview.negative_prompt, encoded)


@torch.no_grad()
def _encode(model: Model, texts: Sequence[str], negative: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return model.encode_captions(texts), model.encode_captions([negative] * len(texts))


def sampling_settings(config: Config) -> SamplingSettings:
    """Return how the previews of a config are sampled."""
    preview, side = config.preview, config.data.resolution_px
    return SamplingSettings(
        num_inference_steps=preview.num_inference_steps,
        guidance_scale=preview.guidance_scale,
        width_px=preview.width_px or side,
        height_px=preview.height_px or side,
    )


def render(
    model: Model,
    prompts: Prompts,
    seeds: Sequence[int],
    settings: SamplingSettings,
    between: Callable[[], None] = lambda: None,
) -> list[list[Image.Image]]:
    """Draw pictures, one row per prompt and one column per seed.

    A seed means the same noise in every row and at every step. between: called often; to give up the pictures, it
    raises.
    """
    positive, negative = prompts.conditioning(model)
    cells = [(row, seed) for row in range(len(prompts.texts)) for seed in seeds]
    pictures: list[Image.Image] = []
    for start in range(0, len(cells), PICTURES_AT_ONCE):
        chunk = cells[start : start + PICTURES_AT_ONCE]
        rows = [row for row, _ in chunk]
        pixels = sample(
            model,
            {key: value[rows] for key, value in positive.items()},
            {key: value[rows] for key, value in negative.items()},
            [generator_of(seed, "preview") for _, seed in chunk],
            settings,
            between,
        )
        pictures += [to_picture(one) for one in pixels]
    columns = len(seeds)
    return [pictures[index : index + columns] for index in range(0, len(pictures), columns)]


def to_picture(pixels: Tensor) -> Image.Image:
    """Return pixels (3, h, w) in [-1, 1] as an RGB picture."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], prompts: Sequence[str], seeds: Sequence[int], title: str
) -> Image.Image:
    """Return the pictures in a grid, with the prompt above each row and the seed above each picture."""
    scale = max(1, -(-SMALLEST_CELL_PX // min(rows[0][0].size)))
    width, height = rows[0][0].width * scale, rows[0][0].height * scale
    font = ImageFont.load_default(size=12)
    across = width * len(seeds)
    folded = [textwrap.wrap(prompt, max(12, across // 7)) or ["(empty prompt)"] for prompt in prompts]
    total = LABEL_PX + sum(height + LABEL_PX * (len(lines) + 1) for lines in folded)
    grid = Image.new("RGB", (across, total), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((4, 2), title, fill="black", font=font)
    top = LABEL_PX
    for pictures, lines in zip(rows, folded, strict=True):
        for line in lines:
            draw.text((4, top + 2), line, fill="black", font=font)
            top += LABEL_PX
        for column, (picture, seed) in enumerate(zip(pictures, seeds, strict=True)):
            draw.text((column * width + 4, top + 2), f"seed {seed}", fill="grey", font=font)
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (column * width, top + LABEL_PX))
        top += LABEL_PX + height
    return grid


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_file(path) as file:
        picture.save(file, format="PNG")
