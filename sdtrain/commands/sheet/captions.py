"""A caption as text encoders read it: its tokens, where it is cut, and what in it is a trigger or a tag; no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.config.schema import FolderConfig
from sdtrain.data.captions.wording import wording_of
from sdtrain.errors import printable
from sdtrain.models.token_counts import CHUNK_TOKENS, pieces_of


@dataclass(frozen=True)
class Span:
    """A piece of a caption as it is shown. kinds: what it is, as words of the style sheet, e.g. `token cut`."""

    text: str
    kinds: str


@dataclass(frozen=True)
class ShownCaption:
    """A caption in its pieces. limit: how many tokens are read. last: the last token that is, with its word, where
    others are not.

    needed: the chunks that would read all of it.
    """

    spans: tuple[Span, ...]
    num_tokens: int
    limit: int
    last: str
    needed: int

    @property
    def is_cut(self) -> bool:
        """Whether its end is not read."""
        return self.num_tokens > self.limit


def shown_caption(tokenizers: Sequence[Any], caption: str, num_chunks: int, folder: FolderConfig) -> ShownCaption:
    """Return a caption of a folder in its pieces, as so many chunks of tokens read it."""
    limit = CHUNK_TOKENS * num_chunks
    pieces = pieces_of(tokenizers, caption)
    num_tokens = sum(piece.num_tokens for piece in pieces)
    regions = list(_regions(caption, folder))
    spans: list[Span] = []
    start, last = 0, ""
    for piece in pieces:
        stop = start + len(piece.text)
        kinds = [kind for kind, left, right in regions if left < stop and start < right]
        if piece.num_tokens:
            kinds.append(f"token shade{piece.first % 2}")
            last = _in_its_word(caption, start, stop) if piece.first < limit < num_tokens else last
        is_split = piece.first < limit < piece.first + piece.num_tokens  # some tokens of a character are not read
        if is_split or piece.first > limit or (piece.first == limit and piece.num_tokens):
            kinds.append("cut" if any("cut" in span.kinds for span in spans) else "cut first")
        elif piece.num_tokens and piece.first and piece.first % CHUNK_TOKENS == 0:
            kinds.append("chunk")
        spans.append(Span(printable(piece.text), " ".join(kinds)))
        start = stop
    return ShownCaption(tuple(spans), num_tokens, limit, printable(last), -(-num_tokens // CHUNK_TOKENS))


def _in_its_word(caption: str, start: int, stop: int) -> str:
    """A token as it is named: itself, and the word that it is a part of."""
    token = caption[start:stop]
    left, right = caption.rfind(" ", 0, start) + 1, caption.find(" ", stop)
    word = caption[left : right if right >= 0 else len(caption)].rstrip(",.;:!?)")
    return f"“{token}”" if len(word) <= len(token) else f"“{token}” in “{word}”"


def _regions(caption: str, folder: FolderConfig) -> Iterator[tuple[str, int, int]]:
    """What in a caption has a meaning of its own: its kind, where it begins and where it ends."""
    wording = wording_of(folder)
    if wording.trigger:
        for match in re.finditer(rf"(?<!\w){re.escape(wording.trigger)}(?!\w)", caption, flags=re.IGNORECASE):
            yield "trigger", match.start(), match.end()
    if wording.shuffle or wording.dropout:
        for match in re.finditer(re.escape(wording.separator), caption):
            yield "separator", match.start(), match.end()
