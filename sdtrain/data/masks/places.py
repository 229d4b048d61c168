"""Where the masks of a folder stand, and which picture each belongs to. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import assert_never

from sdtrain.config.schema import FolderConfig
from sdtrain.data.masks.mask import Mask
from sdtrain.data.scanning.files import files_below, real_path
from sdtrain.data.scanning.findings import Finding
from sdtrain.data.scanning.pair import Pair, is_foreign, is_picture
from sdtrain.errors import Problem

MARK = ".mask"
"""What stands between the name of a picture and the suffix of its mask, where that stands beside it."""
SUFFIX = ".png"


@dataclass(frozen=True)
class Found:
    """The files of a folder. others: without its masks. masks: by the place that their pictures have below root."""

    others: list[Path]
    masks: Mapping[str, Path] = field(default_factory=dict)
    findings: Sequence[Finding] = ()


def find_masks(root: Path, files: Sequence[Path], folder: FolderConfig, setting: str) -> Found:
    """Return the masks among and for the files of a folder, as it says where they stand.

    setting: the name of the folder in the config.
    """
    match folder.masks:
        case "none" | "alpha":
            return Found(list(files), findings=_not_meant(files))
        case "beside":
            masks = [path for path in files if _is_marked(path)]
            others = [path for path in files if not _is_marked(path)]
            return Found(others, {_place(path.with_suffix(""), root): path for path in masks}, _not_png(masks))
        case "folder":
            return _in_folder(root, files, folder, setting)
        case _:
            assert_never(folder.masks)


def with_masks(
    root: Path, pairs: Sequence[Pair], found: Found, folder: FolderConfig, setting: str
) -> tuple[list[Pair], list[Finding]]:
    """Return the pictures of a folder with their masks, and what is wrong with where these stand.

    A picture without a mask counts as a whole; a mask without a picture is a mistake.
    """
    findings = list(found.findings)
    if folder.masks == "none":
        return list(pairs), findings
    if folder.masks == "alpha":
        return [replace(pair, mask=Mask(pair.picture, True, folder.mask_floor)) for pair in pairs], findings
    if pairs and not found.masks and not findings:
        looked = f"name{MARK}{SUFFIX} beside name.jpg" if folder.masks == "beside" else f"name{SUFFIX} for name.jpg"
        what = f"{folder.masks}, but no picture has a mask (looked for {looked}); add some, or set it to none"
        return list(pairs), [Finding("folder", Problem(f"{setting}.masks", what))]
    masks = [found.masks.get(_place(pair.picture, root)) for pair in pairs]
    taken = {_place(pair.picture, root) for pair in pairs}
    taken |= {_place(path, root) for path in found.others if is_foreign(path)}  # that picture itself is told
    what = "mask without a picture of the same name; add the picture, or remove or rename the mask"
    findings += [
        Finding("mask without a picture", Problem(str(path), what))
        for place, path in found.masks.items()
        if place not in taken
    ]
    return [
        replace(pair, mask=Mask(path, False, folder.mask_floor)) if path else pair
        for pair, path in zip(pairs, masks, strict=True)
    ], findings


def _in_folder(root: Path, files: Sequence[Path], folder: FolderConfig, setting: str) -> Found:
    where, top = f"{setting}.mask_path", Path(folder.mask_path).expanduser()
    if not top.is_dir():
        what = f"no such folder: {top}" if not top.exists() else f"not a folder: {top}"
        return Found(list(files), findings=[Finding("folder", Problem(where, what))])
    real = real_path(top)
    if real == real_path(root):
        what = 'is the folder of the pictures themselves; set masks = "beside" and name them name.mask.png'
        return Found(list(files), findings=[Finding("folder", Problem(where, what))])
    masks, findings = files_below(top, folder.exclude)
    masks = [path for path in masks if is_picture(path)]
    others = [path for path in files if not real_path(path.parent).is_relative_to(real)]
    return Found(others, {_place(path, top): path for path in masks}, [*findings, *_not_png(masks)])


def _not_meant(files: Sequence[Path]) -> list[Finding]:
    """Return a finding for each file that is named as the mask of a picture, and would be trained as one itself."""
    names = {path.with_suffix("") for path in files if is_picture(path)}
    texts = {path for path in files if path.suffix.lower() in (".txt", ".caption")}
    what = (
        'is named as the mask of a picture; set masks = "beside" in its folder to use it as one, or leave it out: '
        f'exclude = ["*{MARK}.*"]'
    )
    return [
        Finding("mask that is not used", Problem(str(path), what))
        for path in files
        if _is_marked(path)
        and path.with_suffix("").with_suffix("") in names
        and not {path.with_suffix(".txt"), path.with_suffix(".caption")} & texts  # captioned: it is meant as a picture
    ]


def _not_png(masks: Sequence[Path]) -> list[Finding]:
    what = f"a mask must be a PNG, which keeps black black; save it as {{}}{SUFFIX}"
    return [
        Finding("mask that is no PNG", Problem(str(path), what.format(path.stem)))
        for path in masks
        if path.suffix.lower() != SUFFIX
    ]


def _is_marked(path: Path) -> bool:
    return is_picture(path) and path.with_suffix("").suffix.lower() == MARK


def _place(path: Path, root: Path) -> str:
    """The path below root without its suffix, so written that é is the same letter in one sign or in two."""
    return unicodedata.normalize("NFC", path.with_suffix("").relative_to(root).as_posix())
