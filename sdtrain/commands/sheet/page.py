"""The contact sheet as HTML: one page that needs nothing else, or several that link to one another."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from markupsafe import Markup
from PIL import Image

from sdtrain.commands.sheet.cards import PER_PAGE, Sheet
from sdtrain.data.report.names import counted
from sdtrain.errors import printable
from sdtrain.training.watching.report.templates import template

GENERATOR = "sdtrain view"
"""What a page says made it, so that nothing else is ever written over."""
_QUALITY = 80
_BUFFERED = 200  # parts of a page that are written together


@dataclass(frozen=True)
class Heading:
    """What stands over a sheet: where it comes from, and what `check` tells of it, a line each."""

    name: str
    source: str
    facts: Sequence[str]
    worth: Sequence[str]


def page_parts(sheet: Sheet, heading: Heading, page: int) -> Iterator[str]:
    """Yield the HTML of a page, counted from 0, in parts that follow each other; few pictures are held at a time.

    Raises UserError if a picture can no longer be read.
    """

    def link(number: int) -> str:
        other = number // PER_PAGE
        return f"{'' if other == page else page_name(other)}#p{number + 1}"

    noted = sorted((sheet.places[path], path.name) for path in sheet.noted)
    num_held_out = sum(entry.example.held_out for entry in sheet.entries)
    stream = template(__package__, "page.html").stream(
        name=printable(heading.name),
        source=printable(heading.source),
        facts=[printable(fact) for fact in heading.facts],
        worth=[printable(note) for note in heading.worth],
        noted=[(number, printable(name)) for number, name in noted],
        num_trained=len(sheet.entries) - num_held_out,
        num_held_out=num_held_out,
        num_pages=sheet.num_pages,
        page=page,
        cards=sheet.cards(page),
        style=Markup(_style()),  # ours, and no part of it comes from elsewhere
        generator=GENERATOR,
        file_name=page_name,
        link=link,
        encoded=_encoded,
        percent=_percent,
        counted=counted,
    )
    stream.enable_buffering(_BUFFERED)
    return iter(stream)


def page_name(page: int) -> str:
    """Return the name of a page's file among several, counted from 0."""
    return f"page-{page + 1:03}.html" if page else "index.html"


def _encoded(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=_QUALITY)
    return base64.b64encode(content.getvalue()).decode()


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


@cache
def _style() -> str:
    return (resources.files("sdtrain.commands.sheet") / "style.css").read_text(encoding="utf-8")
