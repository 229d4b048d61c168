"""From folders to examples: every picture with its caption, and everything that is wrong with them at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.captions.text import CaptionError, read_caption
from sdtrain.data.pictures import SUFFIXES, PictureError, measure
from sdtrain.data.scanning.files import files_below
from sdtrain.data.scanning.findings import Finding, shortened
from sdtrain.data.scanning.pairs import Pair, foreign_pictures, pair_up, read_twice
from sdtrain.data.threads import map_ahead
from sdtrain.errors import Problem
from sdtrain.files.locations import BUILTIN, BUILTIN_FOLDER

BUILTIN_FOLDERS = {BUILTIN + name: BUILTIN_FOLDER / name for name in ("quickstart", "quickstart-known")}


@dataclass(frozen=True)
class Example:
    """A picture and its caption."""

    path: Path
    caption: str
    width_px: int  # of the upright picture
    height_px: int
    repeats: int


def scan_folders(
    config: DataConfig, *, decode: bool, skip: Collection[int] = ()
) -> tuple[list[Example], list[Problem]]:
    """Return all examples of all folders in a stable order (by folder, then naturally by path), and all problems.

    With `decode`, every pixel is read, so that truncated files are found; without, only headers. Examples are
    complete only if there are no problems. Paths are relative to the working directory unless absolute. skip: places
    of folders that are left out.
    """
    pairs: list[Pair] = []
    findings: list[Finding] = []
    owners: dict[Path, int] = {}
    for index, folder in enumerate(config.folder):
        if index in skip:
            continue
        where = f"data.folder[{index}].path"
        root = BUILTIN_FOLDERS.get(folder.path, Path(folder.path).expanduser())
        if reason := _unusable(folder, root):
            findings.append(Finding("folder", Problem(where, reason)))
            continue
        try:
            files = files_below(root)
        except OSError as error:
            findings.append(Finding("folder", Problem(where, f"cannot be read: {error.filename}: {error.strerror}")))
            continue
        findings += foreign_pictures(files)
        found, wrong = pair_up(files, folder)
        if not found:
            allowed = ", ".join(sorted(SUFFIXES))
            findings.append(Finding("folder", Problem(where, f"no pictures in {root} (looked for {allowed})")))
        findings += wrong + read_twice(where, index, found, owners)
        pairs += found
    examples, wrong = _read(pairs, decode=decode)
    return examples, shortened(findings + wrong)


def unreadable_problems(reasons: Sequence[tuple[Path, str]]) -> list[Problem]:
    """Return a problem for each picture that cannot be read, with its reason; a long list is cut."""
    return shortened([Finding("unreadable picture", Problem(str(path), reason)) for path, reason in reasons])


def _unusable(folder: FolderConfig, root: Path) -> str:
    if folder.path.startswith(BUILTIN) and folder.path not in BUILTIN_FOLDERS:
        return f"no such embedded folder: {folder.path}; there is {', '.join(BUILTIN_FOLDERS)}"
    if not root.exists():
        return f"no such folder: {root}"
    if not root.is_dir():
        return f"not a folder: {root}; give the folder that the pictures are in"
    return ""


def _read(pairs: Sequence[Pair], *, decode: bool) -> tuple[list[Example], list[Finding]]:
    """Opens all pictures and captions, several at a time; results keep the order of the pairs."""

    def read(pair: Pair) -> tuple[Example | None, list[Finding]]:
        return _read_one(pair, decode=decode)

    results = list(map_ahead(read, pairs))
    examples = [example for example, _ in results if example is not None]
    return examples, [finding for _, findings in results for finding in findings]


def _read_one(pair: Pair, *, decode: bool) -> tuple[Example | None, list[Finding]]:
    findings: list[Finding] = []
    width_px = height_px = 0
    caption = ""
    try:
        width_px, height_px = measure(pair.picture, decode=decode)
    except PictureError as error:
        findings.append(Finding("unreadable picture", Problem(str(pair.picture), str(error))))
    try:
        caption = read_caption(pair.caption) if pair.caption else ""
    except CaptionError as error:
        findings.append(Finding("unreadable caption", Problem(str(pair.caption), str(error))))
    else:
        if not caption and pair.folder.missing_captions == "error":
            findings.append(Finding("picture without a caption", _uncaptioned(pair)))
    if findings:
        return None, findings
    return Example(pair.picture, caption, width_px, height_px, pair.folder.repeats), []


def _uncaptioned(pair: Pair) -> Problem:
    found = "its caption file is empty" if pair.caption else "no caption"
    name = pair.picture.with_suffix(".txt").name
    return Problem(str(pair.picture), f'{found}; write one in {name}, or set missing_captions = "empty"')
