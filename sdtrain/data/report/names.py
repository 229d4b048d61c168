"""Names of pictures in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdtrain.data.examples import Example
from sdtrain.errors import printable

MAX_NAMES = 6


def shown_name(path: Path) -> str:
    """Return the name of a file in which nothing can colour or break a terminal's line."""
    return shown_text(path.name)


def shown_text(text: str) -> str:
    """Return a text on one line in which nothing can steer a terminal."""
    return printable(text)


def names_of(examples: Sequence[Example], numbers: Sequence[str] = ()) -> str:
    """Return the names of pictures, each with its number if there are any; of many the first few and how many more."""
    names = [shown_name(example.path) for example in examples[:MAX_NAMES]]
    if numbers:
        names = [f"{name} {number}" for name, number in zip(names, numbers, strict=False)]
    more = len(examples) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def counted(num: int, one: str = "picture", many: str = "pictures") -> str:
    """Return a number with its noun."""
    return f"{num:,} {one if num == 1 else many}"


def about(num: float) -> str:
    """Return a number that may be a mean: whole ones as they are, others to one place."""
    return f"{num:,.0f}" if round(num, 6) == round(num) else f"about {num:,.1f}"
