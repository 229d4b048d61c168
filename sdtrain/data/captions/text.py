"""Reading captions. Nothing here is random: what a file says is what the caption is."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Literal

Lines = Literal["joined", "drawn"]


class CaptionError(Exception):
    """The file does not hold text; the message says why and what to do."""


def normalise(text: str) -> str:
    """Return the text as one line without leading, trailing or doubled white space.

    Applying it twice changes nothing more.
    """
    return " ".join(text.split())


def texts_of(content: str, lines: Lines) -> tuple[str, ...]:
    """Return the normalised captions that a text holds: itself, or one per line; none if it is blank."""
    texts = [normalise(text) for text in (content.splitlines() if lines == "drawn" else [content])]
    return tuple(dict.fromkeys(text for text in texts if text))


def decode(content: bytes) -> str:
    """Return the text in the bytes of a file, which is UTF-8 with or without a byte order mark.

    Raises CaptionError for other encodings, which would otherwise train on garbled words.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise CaptionError(f"caption is not UTF-8 ({wrong}); save it as UTF-8") from error
    if "\0" in text:
        raise CaptionError("caption holds zero bytes, as UTF-16 or a binary file does; save it as UTF-8")
    return text


def read_text(path: Path) -> str:
    """Return the text in a file. Raises CaptionError, also if the file cannot be opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CaptionError("caption is a device or a pipe; put a text file in its place")  # it could wait for ever
        content = path.read_bytes()
    except OSError as error:
        raise CaptionError(f"caption cannot be read: {error.strerror or error}") from error
    return decode(content)
