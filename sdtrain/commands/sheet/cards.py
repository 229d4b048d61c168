"""What a contact sheet shows of each picture, a page at a time, so that memory does not grow with the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.commands.sheet.captions import ShownCaption, shown_caption
from sdtrain.config.schema import Config, FolderConfig
from sdtrain.data.buckets import Placement
from sdtrain.data.examples import Example
from sdtrain.data.pictures import PictureError
from sdtrain.data.placing import placements_of
from sdtrain.data.report.each import Note, notes_of_each, scale_text
from sdtrain.data.report.names import counted
from sdtrain.data.report.thumbnails import Thumbnail, thumbnail
from sdtrain.data.threads import map_ahead
from sdtrain.errors import printable, user_error
from sdtrain.models.checkpoints.tokenizers import TokenizerSource
from sdtrain.models.token_counts import load_tokenizers, too_long
from sdtrain.training.start import trains_text

PER_PAGE = 100
MOST_WORDINGS = 8


@dataclass(frozen=True)
class Entry:
    """A picture of the sheet and the folder it is in. section: which folder of which kind, for the heading."""

    example: Example
    placement: Placement
    folder: FolderConfig
    section: str


@dataclass(frozen=True)
class Card:
    """A picture as it is shown. number: its place in the sheet, from 0. wordings: of a caption that varies."""

    number: int
    section: str
    name: str
    path: str
    thumbnail: Thumbnail
    bucket: str
    scale: str
    seen: str
    caption: ShownCaption
    varies: str
    wordings: tuple[ShownCaption, ...]
    is_noted: bool
    notes: tuple[tuple[str, int | None], ...]  # each with the number of the picture that it is compared with

    @property
    def num_cut_wordings(self) -> int:
        """How many of the wordings that are shown have an end that is not read."""
        return sum(wording.is_cut for wording in self.wordings)


@dataclass(frozen=True)
class Sheet:
    """All pictures in their order, with the notes on each by its path, and the place of each.

    noted: those with a note or with a caption whose end is not read.
    """

    config: Config
    tokenizers: Sequence[Any]
    entries: Sequence[Entry]
    notes: Mapping[Path, Sequence[Note]]
    places: Mapping[Path, int]
    noted: frozenset[Path]

    @property
    def num_pages(self) -> int:
        """How many pages it takes."""
        return -(-len(self.entries) // PER_PAGE)

    def cards(self, page: int) -> Iterator[Card]:
        """Yield the cards of a page, counted from 0. Raises UserError if a picture can no longer be read."""
        start = page * PER_PAGE
        return map_ahead(self._card, range(start, min(start + PER_PAGE, len(self.entries))))

    def _card(self, number: int) -> Card:
        entry = self.entries[number]
        example, placement = entry.example, entry.placement
        try:
            small = thumbnail(example, placement)
        except PictureError as error:
            raise user_error("data", str(example.path), str(error)) from error
        data = self.config.data
        varies, wordings = self._wordings(example)
        shown = [
            shown_caption(self.tokenizers, caption, data.caption_chunks, entry.folder)
            for caption in (example.caption, *wordings)
        ]
        width, height = placement.bucket
        return Card(
            number=number,
            section=entry.section,
            name=printable(example.path.name),
            path=printable(str(example.path)),
            thumbnail=small,
            bucket=f"{width}x{height}",
            scale=scale_text(placement),
            seen="" if example.repeats in (1, entry.folder.repeats) else f"seen {example.repeats} times an epoch",
            caption=shown[0],
            varies=varies,
            wordings=tuple(shown[1:]),
            is_noted=example.path in self.noted,
            notes=tuple(
                (printable(note.text), self.places[note.other] if note.other else None)
                for note in self.notes.get(example.path, ())
            ),
        )

    def _wordings(self, example: Example) -> tuple[str, tuple[str, ...]]:
        """How a caption varies, in words, and some of its wordings."""
        if example.varied is None:
            return "", ()
        num = self.config.data.caption_variants
        if not example.held_out and trains_text(self.config):
            return "worded anew at each step, for example", example.varied.variants(min(3, num))
        variants = example.varied.variants(num)
        text = f"{counted(len(variants), 'wording', 'wordings')}, of which each step draws one"
        more = len(variants) - MOST_WORDINGS
        return text + (f" (and {more} more)" if more > 0 else ""), variants[:MOST_WORDINGS]


def sheet_of(
    config: Config, sources: Sequence[TokenizerSource], trained: Sequence[Example], held_out: Sequence[Example]
) -> Sheet:
    """Return the sheet of these pictures: those that are trained on by folder, then those that are held out."""
    validated = config.validation.folder or config.data.folder
    setting = "validation.folder" if config.validation.folder else "data.folder"
    entries = [
        *_entries(config, trained, config.data.folder, "data.folder", "trained on"),
        *_entries(config, held_out, validated, setting, "held out, only validated on"),
    ]
    notes = notes_of_each(trained, held_out, config.data, validated)
    places = {entry.example.path: number for number, entry in enumerate(entries)}
    noted = frozenset([*notes, *_cut(config, sources, [*trained, *held_out])])
    return Sheet(config, load_tokenizers(sources), entries, notes, places, noted)


def _cut(config: Config, sources: Sequence[TokenizerSource], examples: Sequence[Example]) -> list[Path]:
    """Return the pictures with a caption, in any of its wordings, whose end is not read."""
    num = config.data.caption_variants
    captions = {
        example.path: {example.caption, *(example.varied.variants(num) if example.varied else ())}
        for example in examples
    }
    every = dict.fromkeys(caption for those in captions.values() for caption in those)
    cut = {long.caption for long in too_long(sources, every, config.data.caption_chunks)}
    return [path for path, those in captions.items() if those & cut]


def _entries(
    config: Config, examples: Sequence[Example], folders: Sequence[FolderConfig], setting: str, what: str
) -> list[Entry]:
    entries = []
    for example, placement in zip(examples, placements_of(examples, config.data), strict=True):
        folder = folders[example.folder]
        section = f"{setting}[{example.folder}] {printable(folder.path)}: {what}"
        if not example.held_out and folder.repeats > 1:
            section += f", {folder.repeats} times an epoch"
        entries.append(Entry(example, placement, folder, section))
    return entries
