"""Pairs the pictures of a folder with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from sdtrain.config.schema import FolderConfig
from sdtrain.data.captions.tables import META_CAP_NAME, METADATA_NAMES, read_meta_cap, read_metadata
from sdtrain.data.pictures import HEIF_SUFFIXES, missing_heif
from sdtrain.data.scanning.beside import pair_beside
from sdtrain.data.scanning.concepts import concept_of
from sdtrain.data.scanning.files import real_path
from sdtrain.data.scanning.findings import Finding
from sdtrain.data.scanning.pair import Pair, is_foreign, is_picture, own_name
from sdtrain.data.scanning.rows import pair_by_rows
from sdtrain.errors import Problem


def foreign_pictures(files: Sequence[Path]) -> list[Finding]:
    """Return a finding for each picture of a format that is not read."""
    return [
        Finding("unsupported picture format", Problem(str(path), _not_read(path))) for path in files if is_foreign(path)
    ]


def pair_up(root: Path, files: Sequence[Path], folder: FolderConfig, setting: str) -> tuple[list[Pair], list[Finding]]:
    """Return the pictures of a folder with their captions, and all that do not go together.

    setting: the name of its setting `captions`.
    """
    pictures = [path for path in files if is_picture(path)]
    match folder.captions:
        case "txt" | "caption":
            pairs, findings = pair_beside(pictures, files, folder)
        case "metadata":
            tables = {path: read_metadata(path, folder.caption_lines) for path in files if path.name in METADATA_NAMES}
            pairs, findings = pair_by_rows(pictures, tables, folder, setting)
        case "meta_cap":
            path = root / META_CAP_NAME
            tables = {path: read_meta_cap(path, folder.caption_lines)} if path in files else {}
            pairs, findings = pair_by_rows(pictures, tables, folder, setting)
        case _:
            assert_never(folder.captions)
    known = set(files)
    pairs = [_named_by_folder(pair, root) for pair in pairs]
    return [_with_hint(pair, root, known) if _has_no_caption(pair) else pair for pair in pairs], findings


def read_twice(setting: str, index: int, pairs: Sequence[Pair], owners: dict[Path, int]) -> list[Finding]:
    """Return a finding if an earlier folder reads some of these pictures too; `owners` notes who reads what.

    setting: where the folders stand in the config.
    """
    twice: list[int] = []
    for pair in pairs:
        owner = owners.setdefault(real_path(pair.picture), index)
        if owner != index:
            twice.append(owner)
    if not twice:
        return []
    what = f"{len(twice)} of its pictures are read by {setting}[{min(twice)}] too; use `repeats` to see some more often"
    return [Finding("folder", Problem(f"{setting}[{index}].path", what))]


def _not_read(path: Path) -> str:
    if path.suffix.lower() in HEIF_SUFFIXES:
        return missing_heif()
    return f"{path.suffix} pictures are not read; convert it to PNG or JPEG, or remove it"


def _has_no_caption(pair: Pair) -> bool:
    return pair.caption is None and not pair.texts


def _named_by_folder(pair: Pair, root: Path) -> Pair:
    """Return the pair with the repeats and the caption that its folder's name stands for, if it is to be read so."""
    concept = concept_of(pair.picture, root)
    if concept is None:
        return replace(pair, repeats=pair.folder.repeats)
    pair = replace(pair, repeats=pair.folder.repeats, concept=concept.folder)
    if pair.folder.folder_names == "plain":
        return pair
    texts = (concept.words,) if _has_no_caption(pair) else pair.texts
    return replace(pair, repeats=pair.repeats * concept.repeats, texts=texts)


def _with_hint(pair: Pair, root: Path, files: set[Path]) -> Pair:
    """Return the pair with what was found in place of its caption, if anything was."""
    picture = pair.picture
    own = own_name(picture, pair.folder)
    for kind in ("txt", "caption"):
        longer = picture.with_name(f"{picture.name}.{kind}")
        if longer in files:
            return replace(pair, beside=f"{longer.name} stands beside it: rename it to {own}")
        if pair.folder.captions != kind and picture.with_suffix(f".{kind}") in files:
            name = picture.with_suffix(f".{kind}").name
            return replace(pair, beside=f'{name} stands beside it: set captions = "{kind}"')
    for table in (*(picture.parent / name for name in METADATA_NAMES), *(root / name for name in METADATA_NAMES)):
        if pair.folder.captions != "metadata" and table in files:
            return replace(pair, beside=f'there is {table.name}: set captions = "metadata"')
    if pair.folder.captions != "meta_cap" and root / META_CAP_NAME in files:
        return replace(pair, beside=f'there is {META_CAP_NAME}: set captions = "meta_cap"')
    if pair.concept:
        return replace(pair, beside=f'its folder is {pair.concept}: set folder_names = "repeats_concept"')
    return pair
