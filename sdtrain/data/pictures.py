"""Opening picture files: what can be read, which way is up, and why a file is refused."""

from __future__ import annotations

import errno
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, UnidentifiedImageError, features

from sdtrain.data.scanning.looks import Look, look_of

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
UNSUPPORTED_SUFFIXES = frozenset({".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw"})
# A list, because PIL would also try formats that start other programs (EPS) or that are no pictures.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", *(("AVIF",) if features.check("avif") else ()))
MIN_SIDE_PX = 16

# What PIL's decoders raise on damaged files.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    RuntimeError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_EXIF_ORIENTATION = 0x0112
_PNG_METADATA = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset({5, 6, 7, 8})


class PictureError(Exception):
    """The file cannot be used as a picture; the message is the reason and what to do, without the path."""


def measure(path: Path, *, decode: bool) -> tuple[int, int]:
    """Return the width and height in pixels of the upright picture. Raises PictureError.

    With decode, every pixel is read, so that a truncated file is found; without, only what is needed for the size.
    """
    with _opened(path) as image:
        if decode:
            image.load()
        width, height = image.size
        sideways = _orientation(image, path) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def look_at(path: Path) -> tuple[tuple[int, int], Look]:
    """Return the size of the upright picture as `measure`, and how it looks; every pixel is read.

    Raises PictureError.
    """
    with _opened(path) as image:
        image.load()
        orientation = _orientation(image, path)
        width, height = image.size
        size = (height, width) if orientation in _SIDEWAYS else (width, height)
        return size, look_of(image, path, _UPRIGHT.get(orientation))


def load_upright(path: Path) -> Image.Image:
    """Return the whole picture, upright, in the mode of the file. Raises PictureError."""
    with _opened(path) as image:
        image.load()
        turn = _UPRIGHT.get(_orientation(image, path))
        return image.copy() if turn is None else image.transpose(turn)


def load_small(path: Path, longest_px: int) -> Image.Image:
    """Return a picture, upright and in the mode of the file, with a longest side of longest_px at least if it has that.

    A JPEG is read at a half, a quarter or an eighth of its size where that is enough. Raises PictureError.
    """
    with _opened(path) as image:
        if image.format == "JPEG":
            share = longest_px / max(image.size)
            image.draft(None, (max(1, int(image.width * share)), max(1, int(image.height * share))))
        image.load()
        turn = _UPRIGHT.get(_orientation(image, path))
        return image.copy() if turn is None else image.transpose(turn)


@cache
def heif_is_there() -> bool:
    """Return whether pillow-heif is installed, with which HEIC pictures are read."""
    return find_spec("pillow_heif") is not None


def missing_heif() -> str:
    """Return what to do about a HEIC picture where pillow-heif is not installed."""
    return 'HEIC pictures need pillow-heif: pip install "sdtrain[heic]"; or convert it to PNG or JPEG'


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not stat.S_ISREG(_mode(path)):
        raise PictureError("is a device or a pipe, not a picture; remove it")  # opening a pipe would wait for ever
    try:
        with _open(path) as image:
            _refuse_unusable(image)
            yield image
    except BROKEN as error:
        raise PictureError(_reason(path, error)) from error


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        raise PictureError(_reason(path, error)) from error


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        if not _is_heif(path):
            raise
    if not heif_is_there():
        raise PictureError(missing_heif())
    _register_heif()
    return Image.open(path, formats=("HEIF",))


def _is_heif(path: Path) -> bool:
    """Whether a file holds HEIC, whatever its name: phones hand it out as .jpg, too."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


@cache
def _register_heif() -> None:
    import_module("pillow_heif").register_heif_opener()


def _refuse_unusable(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE_PX:
        raise PictureError(f"picture is only {width} x {height} px; at least {MIN_SIDE_PX} px a side are needed")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise PictureError("picture has 32 bits a channel, without a known range; save it with 8 or 16 bits")
    if image.format not in ("MPO", "HEIF") and _has_second_frame(image):  # photographs with a depth map or a twin
        what = "several pages" if image.format == "TIFF" else "several frames (an animation)"
        raise PictureError(f"file holds {what}; save the one that is meant as a picture of its own")


def _has_second_frame(image: Image.Image) -> bool:
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _orientation(image: Image.Image, path: Path) -> int:
    """EXIF's orientation, 1 to 8. A damaged EXIF block counts as 1: viewers show such pictures as they lie."""
    if image.format == "TIFF":
        return 1  # PIL turns TIFFs itself
    if image.format == "PNG" and _has_late_metadata(path):
        image.load()
    try:
        # The method of the base class: PNG's own would decode the picture first, even where metadata comes first.
        orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    except BROKEN:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _has_late_metadata(path: Path) -> bool:
    """Whether a PNG has metadata after its pixels, which PIL only sees once it has read the pixels."""
    with path.open("rb") as file:
        file.seek(8)
        pixels_seen = False
        while len(head := file.read(8)) == 8:
            (length,), kind = struct.unpack(">I", head[:4]), head[4:]
            pixels_seen = pixels_seen or kind == b"IDAT"
            if pixels_seen and kind in _PNG_METADATA:
                return True
            file.seek(length + 4, 1)
    return False


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "file is empty; replace or remove it"
        if _is_heif(path):
            return "picture is damaged; replace or remove it"
        return f"not a picture that can be read ({', '.join(FORMATS)}); convert, replace or remove it"
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return f"picture has more than {most} megapixels, the most that are read; scale it down"
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return "is a link that points nowhere; mend or remove it"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "is a link that leads back to itself; mend or remove it"
    if isinstance(error, OSError) and error.strerror:
        return f"picture cannot be read: {error.strerror}"
    return f"picture is damaged: {error or type(error).__name__}; replace or remove it"
