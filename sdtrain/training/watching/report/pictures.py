"""The previews of a run as small WebP pictures inside the page, bounded in number and size however many there are."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sdtrain.training.watching.grid import UNREADABLE, cut

MOST_STEPS = 12
"""The most steps that are shown: the first, the newest and others evenly between them."""
MOST_STRIPS = 12
"""The most strips, of one prompt and one seed each."""
MOST_BYTES = 2_800_000
"""Of all pictures of a page as text."""
SIZES = ((256, 80), (192, 70), (128, 60), (96, 45))
"""The longest side and the quality, from the best; the first that fits is used."""


@dataclass(frozen=True)
class Shown:
    """One picture of a strip. uri: its data as text."""

    label: str
    uri: str


@dataclass(frozen=True)
class Strip:
    """One prompt and seed over the steps; the base model's picture comes first where it is there."""

    prompt: str
    seed: str
    pictures: list[Shown]


@dataclass(frozen=True)
class Strips:
    """All strips of a page, and how many steps and strips it leaves out."""

    strips: list[Strip] = field(default_factory=list)
    steps_left_out: int = 0
    strips_left_out: int = 0


@dataclass
class Shelf:
    """Encodes pictures, and remembers those of files that have not changed since: a page is written again and again."""

    _kept: dict[tuple[Path, int, int, int], dict[tuple[str, str], str]] = field(default_factory=dict)

    def strips(self, folder: Path) -> Strips:
        """Return the strips of a `previews/` folder; files that cannot be read are passed over."""
        files = preview_files(folder)
        chosen = evenly(files, MOST_STEPS)
        base = folder / "base.png"
        if base.exists() and len(chosen) > 1 and chosen[0][0] == 0:
            chosen = chosen[1:]  # step 0 is the base model
        sources = ([("base", base)] if base.exists() else []) + [(f"step {step}", path) for step, path in chosen]
        longest_px, quality = self._fitting(sources)
        found = self._strips(sources, longest_px, quality)
        current = {path for _, path in sources}
        self._kept = {key: value for key, value in self._kept.items() if key[0] in current}
        return Strips(found.strips, max(0, len(files) - MOST_STEPS), found.strips_left_out)

    def _fitting(self, sources: Sequence[tuple[str, Path]]) -> tuple[int, int]:
        """Return the largest size and quality at which all pictures fit, if they are like those of the last source."""
        for longest_px, quality in SIZES:
            newest = self._cells(sources[-1][1], longest_px, quality) if sources else {}
            if sum(map(len, newest.values())) * len(sources) <= MOST_BYTES:
                return longest_px, quality
        return SIZES[-1]

    def _strips(self, sources: Sequence[tuple[str, Path]], longest_px: int, quality: int) -> Strips:
        columns = [(label, self._cells(path, longest_px, quality)) for label, path in sources]
        keys = list(dict.fromkeys(key for _, cells in reversed(columns) for key in cells))
        strips, room = [], MOST_BYTES
        for key in keys[:MOST_STRIPS]:
            shown = [Shown(label, cells[key]) for label, cells in columns if key in cells]
            room -= sum(len(one.uri) for one in shown)
            if room < 0:
                break
            strips.append(Strip(*key, shown))
        return Strips(strips, 0, len(keys) - len(strips))

    def _cells(self, path: Path, longest_px: int, quality: int) -> dict[tuple[str, str], str]:
        """Return the pictures of a file by prompt and seed, as text."""
        try:
            key = (path, path.stat().st_mtime_ns, longest_px, quality)
            if key not in self._kept:
                self._kept[key] = {
                    (cell.prompt, cell.seed): encoded(cell.picture, longest_px, quality)
                    for cell in cut(path, MOST_STRIPS)
                }
        except UNREADABLE:
            return {}  # damaged, or not ours
        return self._kept[key]


def preview_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps and files of all previews, oldest first."""
    found = [(path.stem.removeprefix("step-"), path) for path in folder.glob("step-*.png")]
    return sorted((int(step), path) for step, path in found if step.isascii() and step.isdecimal())


def evenly(items: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """Return at most `most` items: the first, the last, and those between that are evenly spaced by step."""
    if len(items) <= most:
        return list(items)
    first, last = items[0][0], items[-1][0]
    wanted = [first + (last - first) * index / (most - 1) for index in range(most)]
    chosen = {min(items, key=lambda item: abs(item[0] - step)) for step in wanted}
    return sorted({items[0], *chosen, items[-1]})[:most]


def encoded(picture: Image.Image, longest_px: int, quality: int) -> str:
    """Return a picture as a data URI: WebP, at most `longest_px` on its longest side."""
    small = picture.copy()
    small.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, format="WEBP", quality=quality, method=2)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode("ascii")
