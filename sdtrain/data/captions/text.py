"""Reading captions. Nothing here is random: what a file says is what the caption is."""

from __future__ import annotations

from pathlib import Path


class CaptionError(Exception):
    """The file does not hold text; the message says why and what to do."""


def normalise(text: str) -> str:
    """Return the text as one line without leading, trailing or doubled white space.

    Applying it twice changes nothing more.
    """
    return " ".join(text.split())


def decode(content: bytes) -> str:
    """Return the normalised caption in the bytes of a file, which is UTF-8 with or without a byte order mark.

    Raises CaptionError for other encodings, which would otherwise train on garbled words.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise CaptionError(f"caption is not UTF-8 ({wrong}); save it as UTF-8") from error
    if "\0" in text:
        raise CaptionError("caption holds zero bytes, as UTF-16 or a binary file does; save it as UTF-8")
    return normalise(text)


def read_caption(path: Path) -> str:
    """Return the normalised caption in a file. Raises CaptionError, also if the file cannot be opened."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CaptionError(f"caption cannot be read: {error.strerror or error}") from error
    return decode(content)
