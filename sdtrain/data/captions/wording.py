"""From the texts beside a picture to the caption of a step: trigger, prefix and suffix, tags that move, wildcards."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from sdtrain.config.schema import FolderConfig
from sdtrain.data.captions.text import normalise
from sdtrain.data.counts import stream

_WILDCARD = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_CLOSES = tuple(",.;:!?)")


@dataclass(frozen=True)
class Wording:
    """How texts become captions: the settings of a folder, see `FolderConfig`."""

    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    shuffle: bool = False
    dropout: float = 0.0
    separator: str = ","
    keep: int = 0
    keep_separator: str = ""
    wildcards: bool = False


@dataclass(frozen=True)
class Varied:
    """A caption that is not the same every time: texts of which one is drawn, and how its words vary."""

    texts: tuple[str, ...]
    wording: Wording

    def draw(self, random: Random) -> str:
        """Return one wording; it follows from the state of the generator only."""
        text = self.texts[random.randrange(len(self.texts))] if len(self.texts) > 1 else self.texts[0]
        return _worded(text, self.wording, random)

    def variants(self, num: int) -> tuple[str, ...]:
        """Return wordings to be encoded ahead, each once: up to `num` for each text, one for a text that never varies.

        They follow from the texts and their settings only, so that runs with other seeds find them in the cache.
        """
        drawn: list[str] = []
        for text in self.texts:
            times = num if _varies(text, self.wording) else 1
            drawn += [_worded(text, self.wording, stream("wording", text, number)) for number in range(times)]
        return tuple(dict.fromkeys(drawn))


def wording_of(folder: FolderConfig) -> Wording:
    """Return how a folder words its captions."""
    return Wording(
        trigger=normalise(folder.trigger),
        prefix=normalise(folder.caption_prefix),
        suffix=normalise(folder.caption_suffix),
        shuffle=folder.shuffle_tags,
        dropout=folder.tag_dropout,
        separator=folder.tag_separator,
        keep=folder.keep_tags,
        keep_separator=folder.keep_separator,
        wildcards=folder.wildcards,
    )


def worded(texts: Sequence[str], wording: Wording) -> tuple[str, Varied | None]:
    """Return the caption that normalised texts make, and its variation; None: it is the same every time.

    The caption of texts that vary is the first of them with all its tags in their order and the first of its choices.
    A picture without any text has the empty caption, or the folder's trigger, prefix and suffix.
    """
    known = tuple(texts) or ("",)
    caption = _worded(known[0], wording, None)
    varies = len(known) > 1 or any(_varies(text, wording) for text in known)
    return caption, Varied(known, wording) if varies else None


def holds_word(caption: str, word: str) -> bool:
    """Return whether a word, or several in a row, stand in a caption, in letters of any case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, flags=re.IGNORECASE) is not None


def _worded(text: str, wording: Wording, random: Random | None) -> str:
    """Return the caption of one text; without a generator the plainest one."""
    if wording.wildcards:
        text = _chosen(text, (lambda options: options[0]) if random is None else random.choice)
    text = _in_tags(text, wording, random)
    if wording.trigger and not holds_word(text, wording.trigger):
        text = f"{wording.trigger}, {text}" if text else wording.trigger
    if wording.prefix:
        text = f"{wording.prefix} {text}"
    if wording.suffix:
        text += wording.suffix if wording.suffix.startswith(_CLOSES) else f" {wording.suffix}"
    return normalise(text)


def _in_tags(text: str, wording: Wording, random: Random | None) -> str:
    """Return the text with its tags left out and moved; without a generator all of them in their order."""
    if not wording.shuffle and not wording.dropout:
        return text
    kept, others = _tags(text, wording)
    if random is not None:
        if wording.dropout:
            others = [tag for tag in others if random.random() >= wording.dropout]
        if wording.shuffle:
            random.shuffle(others)
    return f"{wording.separator.strip()} ".join([*kept, *others])


def _tags(text: str, wording: Wording) -> tuple[list[str], list[str]]:
    """Return the tags that stay where they are, and the others."""
    head, sign, tail = text.partition(wording.keep_separator) if wording.keep_separator else ("", "", "")
    if sign:
        return _split(head, wording), _split(tail, wording)
    tags = _split(text, wording)
    return tags[: wording.keep], tags[wording.keep :]


def _split(text: str, wording: Wording) -> list[str]:
    return [tag.strip() for tag in text.split(wording.separator) if tag.strip()]


def _chosen(text: str, choose: Callable[[list[str]], str]) -> str:
    """Return the text with one of each {a|b} in its place, inner ones first."""
    found = 1
    while found:
        text, found = _WILDCARD.subn(lambda match: choose(match[1].split("|")), text)
    return text


def _varies(text: str, wording: Wording) -> bool:
    _, others = _tags(text, wording)
    moves = wording.shuffle and len(others) > 1
    return moves or (wording.dropout > 0 and bool(others)) or (wording.wildcards and bool(_WILDCARD.search(text)))
