"""What is worth a look in a run's settings and pictures before it trains, told by `check` and `fit` alike; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdtrain.config.schema import Config
from sdtrain.data.captions.drawing import variants_of
from sdtrain.data.examples import Example
from sdtrain.data.placing import placements_of, views_of
from sdtrain.data.report.names import counted, shown_name, shown_text
from sdtrain.data.report.notes import batch_notes, caption_notes, picture_notes
from sdtrain.data.report.summary import DataReport
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.token_counts import CHUNK_TOKENS, caption_bytes, too_long
from sdtrain.training.keeping.disk import LATENT_BYTES_PER_PIXEL
from sdtrain.training.start import trains_text

_SHOWN = 60  # letters of what is cut
WEIGHS_NOISE = ("none", "debiased_kohya")
"""The weightings that give pure noise a weight above 0 where v is predicted."""


def picture_report_notes(
    config: Config, opened: OpenedModel, examples: Sequence[Example], report: DataReport
) -> list[str]:
    """Return what is worth a look before training, one line each, the most important first."""
    once = list({example.path: example for example in examples}.values())  # of several resolutions
    return [
        *_cut_captions(config, opened, once),
        *caption_notes(once, config.data),
        *batch_notes(examples, config.data, report),
        *picture_notes(once, report),
        *_views(config, examples),
        *_variants(config, opened, examples),
    ]


def setting_notes(config: Config, facts: OpenedModel) -> list[str]:
    """Return what the settings mean that their user may not expect, a sentence each; most runs have none."""
    zero = config.model.zero_terminal_snr
    ends_in_noise = facts.zero_terminal_snr if zero == "auto" else zero == "on"
    last = facts.num_timesteps - 1
    if not ends_in_noise or config.timesteps.last < last or config.loss.weighting in WEIGHS_NOISE:
        return []
    return [
        f"loss.weighting = {config.loss.weighting} gives timestep {last}, pure noise under zero terminal SNR, "
        "the weight 0: it is not trained, though sampling starts there. none and debiased_kohya train it."
    ]


def note_lines(notes: Sequence[str]) -> list[str]:
    """Return notes as they are printed, under a line of their own; nothing where there are none."""
    return ["worth a look:", *(f"  {note}" for note in notes)] if notes else []


def _views(config: Config, examples: Sequence[Example]) -> list[str]:
    """How many views of pictures are encoded, where they are more than the pictures, and what they take."""
    pairs = zip(examples, placements_of(examples, config.data), strict=True)
    views = [view for example, placement in pairs for view in views_of(example, placement)]
    num = len({example.path for example in examples})
    if len(views) == num:
        return []
    flipped = sum(view.flipped for view in views)
    size = sum(math.prod(view.bucket) for view in views) * LATENT_BYTES_PER_PIXEL / 1e6
    text = f"views: {counted(len(views), 'view', 'views')} of {counted(num)} are encoded"
    return [text + (f", {flipped:,} of them flipped" if flipped else "") + f", {size:,.1f} MB in the cache"]


def _cut_captions(config: Config, opened: OpenedModel, examples: Sequence[Example]) -> list[str]:
    chunks = config.data.caption_chunks
    owners = {example.caption: example for example in reversed(examples)}
    for varied, variants in variants_of(examples, config.data.caption_variants).items():
        owner = next(example for example in examples if example.varied == varied)
        owners |= dict.fromkeys(variants, owner)
    found = too_long(opened.tokenizers, owners, chunks)
    if not found:
        return []
    longest = found[0]
    pictures = {owners[long.caption].path for long in found}
    num = sum(example.path in pictures or example.caption in {long.caption for long in found} for example in examples)
    needed = -(-longest.num_tokens // CHUNK_TOKENS)
    rest = longest.rest if len(longest.rest) <= _SHOWN else longest.rest[:_SHOWN].rstrip() + " ..."
    return [
        f"captions cut: {num:,} of {len(examples):,}, longer than {CHUNK_TOKENS * chunks} tokens, at most "
        f'{longest.num_tokens} ({shown_name(owners[longest.caption].path)}), where "{shown_text(rest)}" is not read; '
        f"set data.caption_chunks = {needed} to read all, or shorten them"
    ]


def _variants(config: Config, opened: OpenedModel, examples: Sequence[Example]) -> list[str]:
    varied = [example for example in examples if example.varied is not None]
    if not varied:
        return []
    what = f"captions that vary: {len(varied):,} of {len(examples):,}"
    if trains_text(config):
        return [f"{what}; text encoders are trained, so each step words them anew"]
    num = sum(len(variants) for variants in variants_of(varied, config.data.caption_variants).values())
    size = num * caption_bytes(opened, config.data.caption_chunks) / 1e6
    return [
        f"{what}; {counted(num, 'wording', 'wordings')} are encoded ahead, up to {size:,.0f} MB in the cache; "
        f"data.caption_variants = {config.data.caption_variants} for each says how many"
    ]
