"""The register of a run's pictures: what they were when a state was taken, and what has become of them since. No torch.

A picture is known by the digest of its file, so that another name or another place in the folder is no change; one that
was edited in place is known by its name. What was seen of an epoch belongs to the picture, not to its number.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from sdtrain.data.examples import Example
from sdtrain.data.order import Start
from sdtrain.files.hashes import digest_of

DIGEST_DIGITS = 32
SHOWN_NAMES = 3


@dataclass(frozen=True)
class Picture:
    """One picture as it was trained on. digest: of its file. caption: the digest of its caption. mask: of its mask."""

    name: str
    digest: str
    caption: str
    width_px: int
    height_px: int
    repeats: float
    mask: str = ""  # states of before there were masks do not say
    resolution_px: int = 0  # of its folder; 0: that of all


@dataclass(frozen=True)
class Changes:
    """What has become of the pictures of a state.

    before: for each picture of now its number then, None for one that was added. removed: the numbers then of those
    that are gone. changed: the numbers now of those with other pixels, another caption, another mask or other repeats.
    """

    before: tuple[int | None, ...]
    removed: tuple[int, ...]
    changed: tuple[int, ...]

    @property
    def added(self) -> tuple[int, ...]:
        """The numbers now of the pictures that were added."""
        return tuple(number for number, before in enumerate(self.before) if before is None)

    def __bool__(self) -> bool:
        """Whether anything changed that the training could notice; names do not count."""
        return bool(self.added or self.removed or self.changed)


def pictures_of(
    examples: Sequence[Example], digests: Sequence[bytes], masks: Mapping[Path, bytes]
) -> tuple[Picture, ...]:
    """Return the register of examples, whose files have these digests; masks: those of the files of their masks."""
    return tuple(
        Picture(
            name=str(example.path),
            digest=digest.hex()[:DIGEST_DIGITS],
            caption=digest_of(_said(example).encode("utf-8", "surrogatepass")),
            width_px=example.width_px,
            height_px=example.height_px,
            repeats=example.repeats,
            mask=_mask(example, masks),
            resolution_px=example.resolution_px,
        )
        for example, digest in zip(examples, digests, strict=True)
    )


def _mask(example: Example, masks: Mapping[Path, bytes]) -> str:
    if example.mask is None:
        return ""
    return "alpha" if example.mask.is_alpha else masks[example.mask.path].hex()[:DIGEST_DIGITS]


def _said(example: Example) -> str:
    """The caption of a picture, or all the texts that it is drawn from."""
    return "\n".join(example.varied.texts) if example.varied else example.caption


def register_text(pictures: Sequence[Picture], start: Start | None) -> str:
    """Return the text of a register, with where its order began."""
    rows = [astuple(picture) for picture in pictures]
    return json.dumps({"pictures": rows, "start": None if start is None else asdict(start)})


def read_register(text: bytes) -> tuple[tuple[Picture, ...], Start | None]:
    """Return what `register_text` was given. The text must be checked: nothing is mended here."""
    content: dict[str, Any] = json.loads(text)
    start = content["start"]
    began = None if start is None else Start(start["step"], start["epoch"], tuple(start["left"]))
    return tuple(Picture(*row) for row in content["pictures"]), began


def compare(before: Sequence[Picture], now: Sequence[Picture]) -> Changes:
    """Return what has become of the pictures of a state, each of which is found again at most once."""
    found: dict[int, int] = {}  # number now -> number then
    known_by: tuple[Callable[[Picture], Hashable], ...] = (
        lambda picture: (picture.digest, picture.name, picture.resolution_px),
        lambda picture: (picture.digest, picture.caption, picture.repeats, picture.resolution_px),
        lambda picture: picture.digest,
        lambda picture: picture.name,
    )
    for key in known_by:
        waiting: dict[Hashable, list[int]] = defaultdict(list)
        taken = set(found.values())
        for number, picture in reversed(list(enumerate(before))):
            if number not in taken:
                waiting[key(picture)].append(number)
        for number, picture in enumerate(now):
            if number not in found and waiting[key(picture)]:
                found[number] = waiting[key(picture)].pop()
    same = set(found.values())
    return Changes(
        before=tuple(found.get(number) for number in range(len(now))),
        removed=tuple(number for number in range(len(before)) if number not in same),
        changed=tuple(number for number, old in sorted(found.items()) if _differ(before[old], now[number])),
    )


def _differ(one: Picture, other: Picture) -> bool:
    told = (
        (picture.digest, picture.caption, picture.repeats, picture.mask, picture.resolution_px)
        for picture in (one, other)
    )
    return len(set(told)) > 1


def told(changes: Changes, before: Sequence[Picture], now: Sequence[Picture]) -> str:
    """Return the changes in one line: numbers and a few names."""
    kinds = {
        "added": [now[number].name for number in changes.added],
        "removed": [before[number].name for number in changes.removed],
        "changed": [now[number].name for number in changes.changed],
    }
    parts = [f"{len(names)} {what} ({_some(names)})" for what, names in kinds.items() if names]
    return "pictures: " + ", ".join(parts)


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def left_now(
    changes: Changes,
    before: Sequence[Picture],
    now: Sequence[Picture],
    left_before: Sequence[int],
    counts: tuple[Sequence[int], Sequence[int]],
) -> tuple[int, ...]:
    """Return how often each picture of now is still seen in the epoch that was begun with those of before.

    left_before: the same of the pictures of then. counts: how often a whole one has the pictures of then, and those of
    now. What a picture was seen belongs to it, and so does whether it was drawn, so none is lost or doubled; one that
    was added is seen as often as its folder says. Below 0: see `Start`.
    """
    left = []
    for picture, number, count in zip(now, changes.before, counts[1], strict=True):
        if number is None:
            left.append(count)
        else:
            more = 0 if picture.repeats == before[number].repeats else count - counts[0][number]
            left.append(left_before[number] + more)
    return tuple(left)
