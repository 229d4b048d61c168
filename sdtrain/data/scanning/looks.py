"""How a picture looks in 200 bytes, so that copies are found among thousands without keeping any in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

_GRID = 8
_VISIBLE = 2  # levels of grey: a smaller step between two fields is noise, of JPEG for one


@dataclass(frozen=True)
class Look:
    """What is remembered of a picture that was read.

    digest: of the file's bytes. edges: 64 bits, one for each step to the right in a grid of 9 x 8 fields of grey, set
    where it gets visibly darker (a difference hash). num_visible: how many of the steps are visible at all, either way.
    colours: of a grid of 8 x 8 fields, 3 bytes each. has_clear_parts: whether anything of it is transparent.
    """

    digest: bytes
    edges: int
    num_visible: int
    colours: bytes
    has_clear_parts: bool


def look_of(image: Image.Image, path: Path, turn: Image.Transpose | None) -> Look:
    """Return how a picture that was loaded from a file looks. turn: what makes it upright. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").digest()[:16]
    small, has_clear_parts = _small(image)
    if turn is not None:
        small = small.transpose(turn)
    edges, num_visible = 0, 0
    grey = small.convert("L").resize((_GRID + 1, _GRID), Image.Resampling.BOX).tobytes()
    for row in range(_GRID):
        for column in range(_GRID):
            place = row * (_GRID + 1) + column
            step = grey[place] - grey[place + 1]
            edges = edges << 1 | (step > _VISIBLE)
            num_visible += abs(step) > _VISIBLE
    colours = small.resize((_GRID, _GRID), Image.Resampling.BOX).tobytes()
    return Look(digest, edges, num_visible, colours, has_clear_parts)


def _small(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture on white in 72 x 72 pixels of RGB, and whether anything of it is transparent."""
    size = (_GRID * (_GRID + 1), _GRID * (_GRID + 1))
    if not image.has_transparency_data:
        colours = image if image.mode in ("RGB", "L") else image.convert("RGB")
        return colours.resize(size, Image.Resampling.BOX, reducing_gap=1.0).convert("RGB"), False
    whole = image.convert("RGBA")
    histogram = whole.getchannel("A").histogram()
    clear = whole.resize(size, Image.Resampling.BOX, reducing_gap=1.0)
    small = Image.new("RGB", size, (255, 255, 255))
    small.paste(clear, mask=clear.getchannel("A"))
    return small, any(histogram[:255])
