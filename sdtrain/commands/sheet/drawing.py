"""The contact sheet as a picture: for a chat, or where there is no browser."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sdtrain.commands.sheet.cards import PER_PAGE, Card, Sheet
from sdtrain.data.report.thumbnails import LONGEST_PX
from sdtrain.errors import printable
from sdtrain.files.writer import atomic_file

DRAWN_BY = "sdtrain view"
"""The key of the text in a PNG that says what drew it."""
_MOST_COLUMNS = 6
_GAP_PX, _TITLE_PX, _LINE_PX, _LETTER_PX = 12, 44, 16, 7
_MOST_LINES = 6  # of text under a picture
_PAPER, _INK, _QUIET, _WARNING, _CUT = "#fbfaf8", "#1d1c1a", "#625f59", "#8f3b00", "#a3001e"
_DIMMED = 0.4

Line = tuple[str, str]
"""A line of text and its colour."""


def picture_paths(stem: Path, num_pages: int) -> list[Path]:
    """Return the paths of the pictures of a sheet."""
    if num_pages == 1:
        return [stem.with_name(f"{stem.name}.png")]
    return [stem.with_name(f"{stem.name}-{page + 1:03}.png") for page in range(num_pages)]


def is_drawn_here(path: Path) -> bool:
    """Return whether a file is a picture that `save_page` wrote."""
    if path.suffix != ".png" or not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return DRAWN_BY in image.info
    except (OSError, SyntaxError):
        return False


def save_page(sheet: Sheet, name: str, page: int, path: Path) -> None:
    """Draw a page of a sheet, counted from 0, and write it as a PNG, whole or not at all."""
    about = PngImagePlugin.PngInfo()
    about.add_itxt(DRAWN_BY, name)
    with atomic_file(path) as file:
        drawn_page(sheet, name, page).save(file, format="PNG", pnginfo=about)


def drawn_page(sheet: Sheet, name: str, page: int) -> Image.Image:
    """Return a page of a sheet, counted from 0: each picture with its crop, size, caption and notes.

    Raises UserError if a picture can no longer be read.
    """
    num = min(PER_PAGE, len(sheet.entries) - page * PER_PAGE)
    columns = min(_MOST_COLUMNS, num)
    title = f"{name}: what the model will see; {len(sheet.entries):,} pictures"
    title += f", page {page + 1} of {sheet.num_pages}" if sheet.num_pages > 1 else ""
    cell = LONGEST_PX + _MOST_LINES * _LINE_PX + _GAP_PX
    across, rows = LONGEST_PX + _GAP_PX, -(-num // columns)
    drawn = Image.new("RGB", (columns * across + _GAP_PX, rows * cell + _TITLE_PX), _PAPER)
    font = ImageFont.load_default(size=12)
    ImageDraw.Draw(drawn).text((_GAP_PX, 12), printable(title), fill=_INK, font=ImageFont.load_default(size=18))
    for place, card in enumerate(sheet.cards(page)):
        left, top = _GAP_PX + place % columns * across, _TITLE_PX + place // columns * cell
        picture = _with_crop(card)
        drawn.paste(picture, (left + (LONGEST_PX - picture.width) // 2, top + (LONGEST_PX - picture.height) // 2))
        draw = ImageDraw.Draw(drawn)
        for number, (text, colour) in enumerate(_lines(card)):
            draw.text((left, top + LONGEST_PX + 4 + number * _LINE_PX), text, fill=colour, font=font)
    return drawn


def _with_crop(card: Card) -> Image.Image:
    """The picture, dimmed where it is cropped away, with a frame around the rest."""
    image, (left, top, width, height) = card.thumbnail.image, card.thumbnail.crop
    box = (
        round(left * image.width),
        round(top * image.height),
        max(round(left * image.width) + 1, round((left + width) * image.width)),
        max(round(top * image.height) + 1, round((top + height) * image.height)),
    )
    dimmed = image.point(lambda level: round(level * _DIMMED))
    dimmed.paste(image.crop(box), box[:2])
    draw = ImageDraw.Draw(dimmed)
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline="white", width=2)
    return dimmed


def _lines(card: Card) -> list[Line]:
    """What stands under a picture: its name, its size, notes, and as much of its caption as there is room for."""
    across = LONGEST_PX // _LETTER_PX
    lines = [(_cut_off(card.name, across), _INK), (_size(card, across), _QUIET)]
    if card.section.partition(": ")[2].startswith("held out"):
        lines.append(("held out", _QUIET))
    notes = [text for text, _ in card.notes]
    if card.caption.is_cut:
        notes.insert(0, f"cut: {card.caption.limit} of {card.caption.num_tokens} tokens, to {card.caption.last}")
    lines += [(_cut_off(note, across), _WARNING) for note in notes[: _MOST_LINES - 3]]
    read = "".join(span.text for span in card.caption.spans if "cut" not in span.kinds) or "no caption"
    room = _MOST_LINES - len(lines)
    wrapped = textwrap.wrap(read, across)
    if len(wrapped) > room:
        wrapped = [*wrapped[: room - 1], _cut_off(wrapped[room - 1] + " ...", across)]
    return [*lines, *((line, _INK) for line in wrapped)]


def _size(card: Card, across: int) -> str:
    size = f"{card.bucket}  {card.scale.partition(',')[0]}"
    return size if len(size) <= across else size.partition(" (")[0]


def _cut_off(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
