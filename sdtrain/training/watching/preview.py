"""Draws pictures to look at while training, prompts by seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sdtrain.config.schema import Config
from sdtrain.models.model import Model, SamplingSettings
from sdtrain.models.sampling import sample
from sdtrain.training.run import generator_of
from sdtrain.training.watching.grid import Compared, DrawnFrom, Rows, keep_base, kept_base, labelled_grid

PICTURES_AT_ONCE = 4


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
        guidance_rescale=preview.guidance_rescale,
        sampler=preview.sampler,
    )


def drawn_from(config: Config, step: int | None, loras: Sequence[tuple[Path, float]] = ()) -> DrawnFrom:
    """Return what the pictures of a config's prompts and seeds are drawn from. loras: files that are added on top."""
    preview = config.preview
    return DrawnFrom(
        prompts=tuple(preview.prompts),
        seeds=tuple(preview.seeds),
        negative_prompt=preview.negative_prompt,
        **asdict(sampling_settings(config)),
        run=config.name,
        base=Path(config.model.path).name,
        step=step,
        loras=tuple((file.stem, weight) for file, weight in loras),
    )


def render(
    model: Model,
    prompts: Prompts,
    seeds: Sequence[int],
    settings: SamplingSettings,
    between: Callable[[], None] = lambda: None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[list[Image.Image]]:
    """Draw pictures, one row per prompt and one column per seed.

    A seed means the same noise in every row and at every step. between and autocast: see `sample`.
    """
    pictures = render_share(model, prompts, seeds, settings, between, autocast)
    return in_rows([pictures[number] for number in range(len(pictures))], len(seeds))


def in_rows(pictures: Sequence[Image.Image], columns: int) -> list[list[Image.Image]]:
    """Return pictures in rows of so many."""
    return [list(pictures[index : index + columns]) for index in range(0, len(pictures), columns)]


def render_share(
    model: Model,
    prompts: Prompts,
    seeds: Sequence[int],
    settings: SamplingSettings,
    between: Callable[[], None] = lambda: None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    hand: int = 0,
    hands: int = 1,
) -> dict[int, Image.Image]:
    """Draw what the process `hand` does of the pictures of `render`, which so many share; return them by number.

    What is drawn at once stays together, so that it is the same whoever draws it.
    """
    positive, negative = prompts.conditioning(model)
    cells = [(row, seed) for row in range(len(prompts.texts)) for seed in seeds]
    pictures: dict[int, Image.Image] = {}
    for start in range(hand * PICTURES_AT_ONCE, len(cells), hands * PICTURES_AT_ONCE):
        chunk = cells[start : start + PICTURES_AT_ONCE]
        rows = [row for row, _ in chunk]
        pixels = sample(
            model,
            {key: value[rows] for key, value in positive.items()},
            {key: value[rows] for key, value in negative.items()},
            [generator_of(seed, "preview") for _, seed in chunk],
            settings,
            between,
            autocast,
        )
        pictures |= {start + number: to_picture(one) for number, one in enumerate(pixels)}
    return pictures


def to_picture(pixels: Tensor) -> Image.Image:
    """Return pixels (3, h, w) in [-1, 1] as an RGB picture."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def preview_grid(rows: Rows, prompts: Prompts, config: Config, step: int, base: Path) -> Image.Image:
    """Return the grid of a step, each picture beside what the base model drew, which step 0 keeps in the file `base`.

    Where a run began otherwise, from other prompts, say, the pictures stand alone.
    """
    seeds, title = config.preview.seeds, f"{config.name}, step {step}"
    drawn_by = {"prompts": prompts.texts, "negative_prompt": prompts.negative, "seeds": seeds}
    drawn_by |= asdict(sampling_settings(config))
    if config.preview.sampler == "euler":
        del drawn_by["sampler"]  # as in runs that began when there was no other
    if step == 0:
        keep_base(rows, base, drawn_by, drawn_from(config, step).words())
        return labelled_grid(rows, prompts.texts, seeds, title)
    kept = kept_base(base, drawn_by, len(prompts.texts), len(seeds))
    beside = Compared(kept, "base", f"step {step}") if kept else None
    return labelled_grid(rows, prompts.texts, seeds, title, beside)
