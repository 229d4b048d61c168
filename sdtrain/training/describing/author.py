"""What the author of a run says of its file (`[export.about]`), in the words of the model specification."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from PIL import Image

from sdtrain.config.schema import Config
from sdtrain.data.pictures import PictureError, load_upright, measure
from sdtrain.errors import Problem
from sdtrain.families.modelspec import spoken
from sdtrain.training.watching.grid import cells_of
from sdtrain.training.watching.report.pictures import preview_files

THUMBNAIL = "export.about.thumbnail"
LONGEST_PX, QUALITY = 256, 82
"""The longest side of a thumbnail and its quality as a JPEG, as the model specification advises: about 15 KB."""


def author_entries(config: Config, folder: Path) -> dict[str, str]:
    """Return the header entries with what the author says. folder: that of the run, for its previews."""
    about = config.export.about
    return spoken(
        author=about.author,
        license=about.license,
        description=about.description,
        tags=", ".join(about.tags),
        trigger_phrase=", ".join(trigger_words(config)),
        usage_hint=about.usage_hint,
        thumbnail=_thumbnail(about.thumbnail, folder),
    )


def trigger_words(config: Config) -> list[str]:
    """Return the words that call for what was taught: those of the settings, or else the triggers of the folders."""
    words = config.export.about.trigger_words or [folder.trigger for folder in config.data.folder]
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))


def author_problems(config: Config) -> list[Problem]:
    """Return what is wrong with the picture for the thumbnail, which a run would find out at its end."""
    named = config.export.about.thumbnail
    if named in ("none", "preview"):
        return []
    path = Path(named).expanduser()
    if not path.is_file():
        return [Problem(THUMBNAIL, f"no such picture: {path}; name a picture, or use `preview` or `none`")]
    try:
        measure(path, decode=True)
    except PictureError as error:
        return [Problem(THUMBNAIL, f"{path} {error}")]
    return []


def _thumbnail(named: str, folder: Path) -> str:
    """Return the small picture as text; empty where there is to be none, or none is there yet.

    A picture that went away after `author_problems` saw it is no reason to lose a run's weights: it is left out.
    """
    if named == "none":
        return ""
    if named == "preview":
        files = preview_files(folder / "previews")
        cells = cells_of(files[-1][1], 1) if files else []
        return data_uri(cells[0].picture) if cells else ""
    try:
        return data_uri(load_upright(Path(named).expanduser()))
    except PictureError:
        return ""


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI: JPEG, LONGEST_PX on its longest side at most."""
    small = picture.convert("RGB")
    small.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def uri_words(uri: str) -> str:
    """Return what a data URI is, in a few words: `image/jpeg, 14 KiB`; its beginning where it is none."""
    found = re.fullmatch(r"data:([\w/.+-]{1,40});base64,([A-Za-z0-9+/=]*)", uri)
    return f"{found[1]}, {len(found[2]) * 3 // 4 / 1024:.0f} KiB" if found else uri[:60]
