"""From folders to examples: every picture with its caption, and everything that is wrong with them at once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.captions import CaptionError, read_caption
from sdtrain.data.pictures import SUFFIXES, UNSUPPORTED_SUFFIXES, PictureError, measure
from sdtrain.data.threads import map_ahead
from sdtrain.errors import Problem
from sdtrain.files.locations import BUILTIN, BUILTIN_FOLDER

BUILTIN_FOLDERS = {BUILTIN + name: BUILTIN_FOLDER / name for name in ("quickstart", "quickstart-known")}
MAX_ALIKE = 12


@dataclass(frozen=True)
class Example:
    """A picture and its caption."""

    path: Path
    caption: str
    width_px: int  # of the upright picture
    height_px: int
    repeats: int
    held_out: bool = False  # only validated on, never trained on


@dataclass(frozen=True)
class _Finding:
    """A problem and the sort it is of: a hundred of one sort must not hide the one of another."""

    sort: str
    problem: Problem


@dataclass(frozen=True)
class _Pair:
    """A picture and where its caption stands; None: it has none."""

    picture: Path
    caption: Path | None
    folder: FolderConfig


def scan_folders(
    config: DataConfig, *, decode: bool, skip: Collection[int] = (), setting: str = "data.folder"
) -> tuple[list[Example], list[Problem]]:
    """Return all examples of all folders in a stable order (by folder, then naturally by path), and all problems.

    With `decode`, every pixel is read, so that truncated files are found; without, only headers. Examples are
    complete only if there are no problems. Paths are relative to the working directory unless absolute. skip: places
    of folders that are left out. setting: where the folders stand in the config, for problems.
    """
    pairs: list[_Pair] = []
    findings: list[_Finding] = []
    owners: dict[Path, int] = {}
    for index, folder in enumerate(config.folder):
        if index in skip:
            continue
        where = f"{setting}[{index}].path"
        root = BUILTIN_FOLDERS.get(folder.path, Path(folder.path).expanduser())
        if reason := _unusable(folder, root):
            findings.append(_Finding("folder", Problem(where, reason)))
            continue
        try:
            files = _files(root)
        except OSError as error:
            findings.append(_Finding("folder", Problem(where, f"cannot be read: {error.filename}: {error.strerror}")))
            continue
        findings += _foreign(files)
        found, wrong = _pair(files, folder)
        if not found:
            allowed = ", ".join(sorted(SUFFIXES))
            findings.append(_Finding("folder", Problem(where, f"no pictures in {root} (looked for {allowed})")))
        findings += wrong + _shared(where, setting, index, found, owners)
        pairs += found
    examples, wrong = _read(pairs, decode=decode)
    return examples, _shorten(findings + wrong)


def unreadable_problems(reasons: Sequence[tuple[Path, str]]) -> list[Problem]:
    """Return a problem for each picture that cannot be read, with its reason; a long list is cut."""
    return _shorten([_Finding("unreadable picture", Problem(str(path), reason)) for path, reason in reasons])


def _shorten(findings: Sequence[_Finding]) -> list[Problem]:
    """The problems in their order; of each sort at most MAX_ALIKE and a line that counts the others."""
    by_sort: dict[str, list[Problem]] = defaultdict(list)
    for finding in findings:
        by_sort[finding.sort].append(finding.problem)
    problems: list[Problem] = []
    for sort, alike in by_sort.items():
        problems += alike[:MAX_ALIKE]
        if len(alike) > MAX_ALIKE:
            problems.append(Problem("...", f"and {len(alike) - MAX_ALIKE} more like this: {sort}"))
    return problems


def _unusable(folder: FolderConfig, root: Path) -> str:
    if folder.path.startswith(BUILTIN) and folder.path not in BUILTIN_FOLDERS:
        return f"no such embedded folder: {folder.path}; there is {', '.join(BUILTIN_FOLDERS)}"
    if not root.exists():
        return f"no such folder: {root}"
    if not root.is_dir():
        return f"not a folder: {root}; give the folder that the pictures are in"
    return ""


def _files(root: Path) -> list[Path]:
    """All files below root in natural order, through links but never twice; hidden ones are left out."""
    seen: set[Path] = set()
    waiting = [root]
    files: list[Path] = []
    while waiting:
        folder = waiting.pop()
        if (real := folder.resolve()) in seen:
            continue
        seen.add(real)
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        waiting += sorted((entry for entry in entries if entry.is_dir()), reverse=True)
        files += [entry for entry in entries if not entry.is_dir()]
    return sorted(files, key=lambda path: ([_natural(part) for part in path.relative_to(root).parts], str(path)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `2.png` before `10.png`: digits count as numbers and come before letters."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if part[:1].isascii() and part.isdigit() else (-1, part) for part in parts]


def _foreign(files: Sequence[Path]) -> list[_Finding]:
    return [
        _Finding(
            "unsupported picture format",
            Problem(str(path), f"{path.suffix} pictures are not read; convert it to PNG or JPEG, or remove it"),
        )
        for path in files
        if path.suffix.lower() in UNSUPPORTED_SUFFIXES
    ]


def _pair(files: Sequence[Path], folder: FolderConfig) -> tuple[list[_Pair], list[_Finding]]:
    """Pictures and captions of the same name in the same folder, and all that do not go together."""
    pictures: dict[Path, list[Path]] = defaultdict(list)
    captions: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() in SUFFIXES:
            pictures[path.with_suffix("")].append(path)
        elif path.suffix.lower() == ".txt":
            captions[path.with_suffix("")].append(path)
    findings: list[_Finding] = []
    pairs = [
        _Pair(picture, captions[stem][0] if stem in captions else None, folder)
        for stem, alike in pictures.items()
        for picture in alike
    ]
    for stem, texts in captions.items():
        if stem not in pictures:
            what = "caption without a picture of the same name; add the picture, or remove or rename the .txt file"
            findings.append(_Finding("caption without a picture", Problem(str(texts[0]), what)))
        elif len(pictures[stem]) > 1:
            names = " and ".join(path.name for path in pictures[stem])
            what = f"is the caption of {names}; rename one of them and give it a caption of its own"
            findings.append(_Finding("pictures that share a caption", Problem(str(texts[0]), what)))
        elif len(texts) > 1:
            names = " and ".join(path.name for path in texts)
            findings.append(_Finding("two captions", Problem(str(pictures[stem][0]), f"has two captions: {names}")))
    return pairs, findings


def _shared(where: str, setting: str, index: int, pairs: Sequence[_Pair], owners: dict[Path, int]) -> list[_Finding]:
    """One finding if an earlier folder reads some of these pictures too; notes in `owners` who reads what."""
    twice: list[int] = []
    for pair in pairs:
        owner = owners.setdefault(pair.picture.resolve(), index)
        if owner != index:
            twice.append(owner)
    if not twice:
        return []
    what = f"{len(twice)} of its pictures are read by {setting}[{min(twice)}] too; use `repeats` to see some more often"
    return [_Finding("folder", Problem(where, what))]


def _read(pairs: Sequence[_Pair], *, decode: bool) -> tuple[list[Example], list[_Finding]]:
    """Opens all pictures and captions, several at a time; results keep the order of the pairs."""

    def read(pair: _Pair) -> tuple[Example | None, list[_Finding]]:
        return _read_one(pair, decode=decode)

    results = list(map_ahead(read, pairs))
    examples = [example for example, _ in results if example is not None]
    return examples, [finding for _, findings in results for finding in findings]


def _read_one(pair: _Pair, *, decode: bool) -> tuple[Example | None, list[_Finding]]:
    findings: list[_Finding] = []
    width_px = height_px = 0
    caption = ""
    try:
        width_px, height_px = measure(pair.picture, decode=decode)
    except PictureError as error:
        findings.append(_Finding("unreadable picture", Problem(str(pair.picture), str(error))))
    try:
        caption = read_caption(pair.caption) if pair.caption else ""
    except CaptionError as error:
        findings.append(_Finding("unreadable caption", Problem(str(pair.caption), str(error))))
    else:
        if not caption and pair.folder.missing_captions == "error":
            findings.append(_Finding("picture without a caption", _uncaptioned(pair)))
    if findings:
        return None, findings
    return Example(pair.picture, caption, width_px, height_px, pair.folder.repeats), []


def _uncaptioned(pair: _Pair) -> Problem:
    found = "its caption file is empty" if pair.caption else "no caption"
    name = pair.picture.with_suffix(".txt").name
    return Problem(str(pair.picture), f'{found}; write one in {name}, or set missing_captions = "empty"')
