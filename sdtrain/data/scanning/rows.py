"""Captions in the rows of one file for many pictures."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdtrain.config.schema import FolderConfig
from sdtrain.data.captions.tables import META_CAP_NAME, METADATA_NAMES, Row, Table
from sdtrain.data.scanning.findings import Finding
from sdtrain.data.scanning.pair import Pair
from sdtrain.errors import Problem


def pair_by_rows(
    pictures: Sequence[Path], tables: Mapping[Path, Table], folder: FolderConfig, setting: str
) -> tuple[list[Pair], list[Finding]]:
    """Pair pictures with the rows that name them, as the setting of that name says.

    A row names a picture by its path below the table's folder, with or without suffix.
    """
    if not tables:
        names = METADATA_NAMES if folder.captions == "metadata" else (META_CAP_NAME,)
        what = f"there is no {' or '.join(names)} in {folder.path}; add one, or choose another value"
        return [], [Finding("folder", Problem(setting, what))]
    places = _places(pictures)
    found: dict[Path, tuple[Path, tuple[str, ...]]] = {}
    findings: list[Finding] = []
    for path, table in tables.items():
        findings += [Finding("unreadable caption", Problem(str(path), what)) for what in table.wrong]
        for row in table.rows:
            matches = _matches(path, row, places, by_name=path.name == META_CAP_NAME)
            if len(matches) != 1:
                findings.append(_not_one(path, row, matches))
            elif matches[0] in found and folder.caption_lines != "drawn":
                what = f'{row.where} names {row.name} again; set caption_lines = "drawn" to draw one caption each time'
                findings.append(Finding("two captions", Problem(str(path), what)))
            else:
                before = found.get(matches[0], (path, ()))[1]
                found[matches[0]] = path, tuple(dict.fromkeys((*before, *row.texts)))
    return [
        Pair(picture, folder, *found[picture]) if picture in found else Pair(picture, folder) for picture in pictures
    ], findings


def _places(pictures: Sequence[Path]) -> dict[str, list[Path]]:
    """Return pictures by whole path, by path without suffix, and by name without suffix."""
    places: dict[str, list[Path]] = defaultdict(list)
    for path in pictures:
        names = (str(path), str(path.with_suffix("")), path.stem)
        for name in {unicodedata.normalize("NFC", name) for name in names}:
            places[name].append(path)
    return places


def _matches(table: Path, row: Row, places: Mapping[str, list[Path]], *, by_name: bool) -> list[Path]:
    """Return the pictures that a row may mean. by_name: its folder may be that of another machine, as in sd-scripts."""
    name = unicodedata.normalize("NFC", row.name.replace("\\", "/"))
    whole = places.get(unicodedata.normalize("NFC", str(table.parent / name)), [])
    if whole or not by_name:
        return whole
    last = Path(name).name
    return places.get(last, []) or places.get(Path(last).stem, [])


def _not_one(path: Path, row: Row, matches: Sequence[Path]) -> Finding:
    if not matches:
        what = f"{row.where} names {row.name}, and no such picture is there; add it, or remove the entry"
        return Finding("caption without a picture", Problem(str(path), what))
    names = " and ".join(str(match) for match in matches)
    what = f"{row.where} may mean {names}; give the pictures names of their own"
    return Finding("pictures that share a caption", Problem(str(path), what))
