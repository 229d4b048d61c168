"""Captions in files of their own, beside the pictures."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdtrain.config.schema import FolderConfig
from sdtrain.data.scanning.findings import Finding
from sdtrain.data.scanning.pair import Pair, is_foreign, is_picture, own_name
from sdtrain.errors import Problem


def pair_beside(
    pictures: Sequence[Path], files: Sequence[Path], folder: FolderConfig
) -> tuple[list[Pair], list[Finding]]:
    """Pair pictures with caption files of the same name in the same folder."""
    suffix = f".{folder.captions}"
    by_stem: dict[str, list[Path]] = defaultdict(list)
    captions: dict[str, list[Path]] = defaultdict(list)
    for path in pictures:
        by_stem[_stem(path)].append(path)
    for path in files:
        if path.suffix.lower() == suffix:
            captions[_stem(path)].append(path)
    pairs = [
        Pair(picture, folder, captions[stem][0] if stem in captions else None)
        for stem, alike in by_stem.items()
        for picture in alike
    ]
    elsewhere = {_stem(path) for path in files if is_foreign(path)}  # the picture itself is told
    findings: list[Finding] = []
    for stem, texts in captions.items():
        alike = by_stem.get(stem, [])
        if not alike and stem not in elsewhere:
            findings += _alone(texts[0], by_stem, captions, folder)
        elif len(alike) > 1:
            names = " and ".join(path.name for path in alike)
            what = f"is the caption of {names}; rename one of them and give it a caption of its own"
            findings.append(Finding("pictures that share a caption", Problem(str(texts[0]), what)))
        elif len(texts) > 1 and alike:
            names = " and ".join(path.name for path in texts)
            findings.append(Finding("two captions", Problem(str(alike[0]), f"has two captions: {names}")))
    return pairs, findings


def _alone(
    caption: Path, pictures: Mapping[str, list[Path]], captions: Mapping[str, list[Path]], folder: FolderConfig
) -> list[Finding]:
    """Return the finding of a caption file that belongs to no picture; none where the picture's own says all."""
    meant = caption.with_suffix("")  # photo.jpg of photo.jpg.txt
    if is_picture(meant) and _stem(meant) in pictures and _stem(meant) not in captions:
        if folder.missing_captions == "error":
            return []
        what = f"is named after the picture and its suffix; rename it to {own_name(meant, folder)}"
    else:
        what = "caption without a picture of the same name; add the picture, or remove or rename "
        what += f"the {caption.suffix} file"
    return [Finding("caption without a picture", Problem(str(caption), what))]


def _stem(path: Path) -> str:
    """The path without its suffix, so written that é is the same letter in one sign or as e with an accent."""
    return unicodedata.normalize("NFC", str(path.with_suffix("")))
