"""A picture and its caption, and which files are pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.schema import FolderConfig
from sdtrain.data.masks.mask import Mask
from sdtrain.data.pictures import HEIF_SUFFIXES, SUFFIXES, UNSUPPORTED_SUFFIXES, heif_is_there


@dataclass(frozen=True)
class Pair:
    """A picture and its caption.

    caption: the file that it stands in; None: it has none. texts: what it says, where that is known already.
    beside: what was found instead of a caption, and what to do about it; empty: nothing.
    concept: the name of a folder above it that is named as in sd-scripts; empty: none is.
    mask: which part of the picture counts; None: all of it.
    """

    picture: Path
    folder: FolderConfig
    caption: Path | None = None
    texts: tuple[str, ...] | None = None
    repeats: float = 1
    beside: str = ""
    concept: str = ""
    mask: Mask | None = None


def is_picture(path: Path) -> bool:
    """Return whether a file is to be read as a picture, by its name."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or (suffix in HEIF_SUFFIXES and heif_is_there())


def is_foreign(path: Path) -> bool:
    """Return whether a file is a picture of a format that is not read, by its name."""
    return path.suffix.lower() in UNSUPPORTED_SUFFIXES | HEIF_SUFFIXES and not is_picture(path)


def own_name(picture: Path, folder: FolderConfig) -> str:
    """Return the name of the file in which a folder expects the caption of a picture."""
    return picture.with_suffix(f".{folder.captions}").name
