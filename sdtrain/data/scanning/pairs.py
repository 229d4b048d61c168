"""Pictures and the captions that belong to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.schema import FolderConfig
from sdtrain.data.pictures import SUFFIXES, UNSUPPORTED_SUFFIXES
from sdtrain.data.scanning.findings import Finding
from sdtrain.errors import Problem


@dataclass(frozen=True)
class Pair:
    """A picture and where its caption stands; None: it has none."""

    picture: Path
    caption: Path | None
    folder: FolderConfig


def foreign_pictures(files: Sequence[Path]) -> list[Finding]:
    return [
        Finding(
            "unsupported picture format",
            Problem(str(path), f"{path.suffix} pictures are not read; convert it to PNG or JPEG, or remove it"),
        )
        for path in files
        if path.suffix.lower() in UNSUPPORTED_SUFFIXES
    ]


def pair_up(files: Sequence[Path], folder: FolderConfig) -> tuple[list[Pair], list[Finding]]:
    """Pictures and captions of the same name in the same folder, and all that do not go together."""
    pictures: dict[Path, list[Path]] = defaultdict(list)
    captions: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() in SUFFIXES:
            pictures[path.with_suffix("")].append(path)
        elif path.suffix.lower() == ".txt":
            captions[path.with_suffix("")].append(path)
    findings: list[Finding] = []
    pairs = [
        Pair(picture, captions[stem][0] if stem in captions else None, folder)
        for stem, alike in pictures.items()
        for picture in alike
    ]
    for stem, texts in captions.items():
        if stem not in pictures:
            what = "caption without a picture of the same name; add the picture, or remove or rename the .txt file"
            findings.append(Finding("caption without a picture", Problem(str(texts[0]), what)))
        elif len(pictures[stem]) > 1:
            names = " and ".join(path.name for path in pictures[stem])
            what = f"is the caption of {names}; rename one of them and give it a caption of its own"
            findings.append(Finding("pictures that share a caption", Problem(str(texts[0]), what)))
        elif len(texts) > 1:
            names = " and ".join(path.name for path in texts)
            findings.append(Finding("two captions", Problem(str(pictures[stem][0]), f"has two captions: {names}")))
    return pairs, findings


def read_twice(where: str, index: int, pairs: Sequence[Pair], owners: dict[Path, int]) -> list[Finding]:
    """One finding if an earlier folder reads some of these pictures too; notes in `owners` who reads what."""
    twice: list[int] = []
    for pair in pairs:
        owner = owners.setdefault(pair.picture.resolve(), index)
        if owner != index:
            twice.append(owner)
    if not twice:
        return []
    what = (
        f"{len(twice)} of its pictures are read by data.folder[{min(twice)}] too; use `repeats` to see some more often"
    )
    return [Finding("folder", Problem(where, what))]
