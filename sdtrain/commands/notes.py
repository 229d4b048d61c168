"""What is told of a run's pictures before it trains, by `check` and `fit` alike; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from sdtrain.config.schema import Config
from sdtrain.data.captions.drawing import variants_of
from sdtrain.data.examples import Example
from sdtrain.data.report.names import counted, shown_name, shown_text
from sdtrain.data.report.notes import batch_notes, caption_notes, picture_notes
from sdtrain.data.report.summary import DataReport
from sdtrain.families.words import DENOISER
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.token_counts import CHUNK_TOKENS, caption_bytes, too_long

_SHOWN = 60  # letters of what is cut


def picture_report_notes(
    config: Config, opened: OpenedModel, examples: Sequence[Example], report: DataReport
) -> list[str]:
    """Return what is worth a look before training, one line each, the most important first."""
    return [
        *_cut_captions(config, opened, examples),
        *caption_notes(examples, config.data),
        *batch_notes(examples, config.data, report),
        *picture_notes(examples, report),
        *_variants(config, opened, examples),
    ]


def note_lines(notes: Sequence[str]) -> list[str]:
    """Return notes as they are printed, under a line of their own; nothing where there are none."""
    return ["worth a look:", *(f"  {note}" for note in notes)] if notes else []


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
    if any(network != DENOISER for network in config.method.train):
        return [f"{what}; text encoders are trained, so each step words them anew"]
    num = sum(len(variants) for variants in variants_of(varied, config.data.caption_variants).values())
    size = num * caption_bytes(opened, config.data.caption_chunks) / 1e6
    return [
        f"{what}; {counted(num, 'wording', 'wordings')} are encoded ahead, up to {size:,.0f} MB in the cache; "
        f"data.caption_variants = {config.data.caption_variants} for each says how many"
    ]
