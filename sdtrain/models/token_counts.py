"""How long captions are for the text encoders, told without torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.checkpoints.tokenizers import TokenizerSource, load_tokenizer

CHUNK_TOKENS = 75
_STATES = 77  # of a chunk, with its first and last token


@dataclass(frozen=True)
class LongCaption:
    """A caption that is cut. rest: the words that no text encoder reads."""

    caption: str
    num_tokens: int
    rest: str


@dataclass(frozen=True)
class Piece:
    """A part of a caption: one token, several that share a character, or what stands between tokens.

    first: the number of its first token, from 0; between tokens, of the next. num_tokens: how many it is, also 0.
    """

    text: str
    first: int
    num_tokens: int


def load_tokenizers(sources: Sequence[TokenizerSource]) -> list[Any]:
    """Return the tokenizers of a model, each loaded once."""
    loaded = {source: load_tokenizer(source) for source in dict.fromkeys(sources)}
    return [loaded[source] for source in sources]


def pieces_of(tokenizers: Sequence[Any], caption: str) -> list[Piece]:
    """Return a caption in the pieces that text encoders read, by the tokenizer that makes most of it.

    Joined they are the caption, letter by letter.
    """
    places: Sequence[tuple[int, int]] = max((_places(tokenizer, caption) for tokenizer in tokenizers), key=len)
    pieces: list[Piece] = []
    start = stop = first = 0
    for number, (left, right) in enumerate([*places, (len(caption), len(caption) + 1)]):
        if left < stop or left == right:  # several tokens of one character
            stop = max(stop, right)
            continue
        pieces += [Piece(caption[start:stop], first, number - first)] if number else []
        pieces += [Piece(caption[stop:left], number, 0)] if left > stop else []
        start, stop, first = left, right, number
    return pieces


def too_long(sources: Sequence[TokenizerSource], captions: Iterable[str], num_chunks: int) -> list[LongCaption]:
    """Return the captions that do not fit into the chunks, the longest first.

    Tokenizers are loaded only where a caption might be too long: a token is one byte at least.
    """
    limit = CHUNK_TOKENS * num_chunks
    candidates = [caption for caption in dict.fromkeys(captions) if _most_tokens(caption) > limit]
    if not candidates:
        return []
    tokenizers = load_tokenizers(sources)
    found = [long for caption in candidates if (long := _measured(tokenizers, caption, limit))]
    return sorted(found, key=lambda long: (-long.num_tokens, long.caption))


def caption_bytes(opened: OpenedModel, num_chunks: int) -> int:
    """Return about how many bytes the encoding of a caption takes in the cache, if text encoders run in float32."""
    widths = {
        (header.path, name): entry.shape[1]
        for headers in opened.headers.values()
        for header in headers
        for name, entry in header.entries.items()
        if name.endswith("token_embedding.weight") and len(entry.shape) == 2
    }
    return 4 * num_chunks * _STATES * sum(widths.values())


def _most_tokens(caption: str) -> int:
    """The most tokens that a caption can be, by its bytes as the tokenizer reads them."""
    return len(unicodedata.normalize("NFC", caption).lower().encode("utf-8", "surrogatepass"))


def _measured(tokenizers: Sequence[Any], caption: str, limit: int) -> LongCaption | None:
    longest = None
    for tokenizer in tokenizers:
        places = _places(tokenizer, caption)
        if len(places) > max(limit, longest.num_tokens if longest else 0):
            longest = LongCaption(caption, len(places), _from_word(caption, places[limit][0]))
    return longest


def _places(tokenizer: Any, caption: str) -> list[tuple[int, int]]:
    """Where each token begins and ends in a caption."""
    encoded = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places: list[tuple[int, int]] = encoded["offset_mapping"]
    return places


def _from_word(caption: str, place: int) -> str:
    """The rest of a caption from the word that a place lies in."""
    return caption[caption.rfind(" ", 0, place + 1) + 1 :]
