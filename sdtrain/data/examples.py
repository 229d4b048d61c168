"""From folders to examples: every picture with its caption, and everything that is wrong with them at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.captions.text import CaptionError, read_text, texts_of
from sdtrain.data.captions.wording import Varied, holds_word, worded, wording_of
from sdtrain.data.masks.mask import Mask, MaskLook, look_at_mask
from sdtrain.data.masks.places import find_masks, with_masks
from sdtrain.data.pictures import SUFFIXES, PictureError, look_at, measure
from sdtrain.data.scanning.files import files_below
from sdtrain.data.scanning.findings import Finding, shortened
from sdtrain.data.scanning.looks import Look
from sdtrain.data.scanning.pair import Pair
from sdtrain.data.scanning.pairs import foreign_pictures, pair_up, read_twice
from sdtrain.data.threads import map_ahead
from sdtrain.errors import Problem
from sdtrain.files.locations import BUILTIN, BUILTIN_FOLDER
from sdtrain.files.progress import Progress

BUILTIN_FOLDERS = {BUILTIN + name: BUILTIN_FOLDER / name for name in ("quickstart", "quickstart-known")}


@dataclass(frozen=True)
class Example:
    """A picture and its caption."""

    path: Path
    caption: str
    width_px: int  # of the upright picture
    height_px: int
    repeats: float
    varied: Varied | None = None  # how the caption varies from step to step; None: it is the same every time
    held_out: bool = False  # only validated on, never trained on
    folder: int = 0  # its place in data.folder, or in validation.folder
    loss_weight: float = 1.0  # factor on its error in training
    resolution_px: int = 0  # what it is trained at; 0: data.resolution_px
    flip: bool = False  # whether it is also seen with left and right exchanged
    crops: int = 1  # how many crops of it are seen in turn
    mask: Mask | None = None  # which part of it counts; None: all
    beside: str = field(default="", compare=False)  # what was found in place of a caption that is missing
    concept: str = field(default="", compare=False)  # a folder above it that is named as in sd-scripts: 10_sks dog
    num_lines: int = field(default=1, compare=False)  # of the caption as it is written; 0: it has none of its own
    has_trigger: bool = field(default=False, compare=False)  # whether the folder's trigger stood in the caption before
    look: Look | None = field(default=None, compare=False)  # where every pixel was read
    mask_look: MaskLook | None = field(default=None, compare=False)  # where its mask was read


def scan_folders(
    config: DataConfig,
    *,
    decode: bool,
    skip: Collection[int] = (),
    setting: str = "data.folder",
    on_progress: Progress | None = None,
) -> tuple[list[Example], list[Problem]]:
    """Return all examples of all folders in a stable order (by folder, then naturally by path), and all problems.

    With `decode`, every pixel is read, so that truncated files are found; without, only headers. Examples are
    complete only if there are no problems. Paths are relative to the working directory unless absolute. skip: places
    of folders that are left out. setting: where the folders stand in the config, for problems.
    `on_progress(what, done, total)` is called from the calling thread.
    """
    pairs: list[tuple[int, Pair]] = []
    findings: list[Finding] = []
    owners: dict[Path, int] = {}
    for index, folder in enumerate(config.folder):
        if index in skip:
            continue
        found, wrong = _scan(f"{setting}[{index}]", folder)
        pairs += [(index, pair) for pair in found]
        findings += wrong + read_twice(setting, index, found, owners)
    examples, wrong = _read(pairs, config.min_side_px, decode=decode, on_progress=on_progress)
    return examples, shortened(findings + wrong)


def _scan(setting: str, folder: FolderConfig) -> tuple[list[Pair], list[Finding]]:
    where = f"{setting}.path"
    root = BUILTIN_FOLDERS.get(folder.path, Path(folder.path).expanduser())
    if reason := _unusable(folder, root):
        return [], [Finding("folder", Problem(where, reason))]
    files, findings = files_below(root, folder.exclude)
    found = find_masks(root, files, folder, setting)
    files = found.others
    findings += foreign_pictures(files)
    pairs, wrong = pair_up(root, files, folder, f"{setting}.captions")
    pairs, of_masks = with_masks(root, pairs, found, folder, setting)
    wrong = [*wrong, *of_masks]
    if not pairs and not findings and not wrong:
        allowed = ", ".join(sorted(SUFFIXES))
        findings.append(Finding("folder", Problem(where, f"no pictures in {root} (looked for {allowed})")))
    return pairs, findings + wrong


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


def _read(
    pairs: Sequence[tuple[int, Pair]], least_px: int, *, decode: bool, on_progress: Progress | None
) -> tuple[list[Example], list[Finding]]:
    """Opens all pictures and captions, several at a time; results keep the order of the pairs."""

    def read(pair: tuple[int, Pair]) -> tuple[Example | None, list[Finding]]:
        return _read_one(*pair, least_px, decode=decode)

    examples: list[Example] = []
    findings: list[Finding] = []
    for done, (example, wrong) in enumerate(map_ahead(read, pairs), 1):
        examples += [example] if example else []
        findings += wrong
        if on_progress:
            on_progress("reading pictures", done, len(pairs))
    return examples, findings


def _read_one(index: int, pair: Pair, least_px: int, *, decode: bool) -> tuple[Example | None, list[Finding]]:
    findings: list[Finding] = []
    size, look, mask_look = (0, 0), None, None
    try:
        if decode:
            size, look = look_at(pair.picture)
        else:
            size = measure(pair.picture, decode=False)
    except PictureError as error:
        findings.append(Finding("unreadable picture", Problem(str(pair.picture), str(error))))
        if not pair.picture.exists():
            return None, findings  # a link that points nowhere needs no caption
    if pair.mask is not None and not findings:
        try:
            mask_look = look_at_mask(pair.mask, pair.picture, size, decode=decode)
        except PictureError as error:
            findings.append(Finding("mask that cannot be used", Problem(str(pair.mask.path), str(error))))
    try:
        texts, num_lines = _texts(pair)
    except CaptionError as error:
        findings.append(Finding("unreadable caption", Problem(str(pair.caption), str(error))))
    else:
        if not texts and pair.folder.missing_captions == "error":
            findings.append(Finding("picture without a caption", _uncaptioned(pair)))
    if not findings and min(size) < least_px:
        what = (
            f"is {size[0]} x {size[1]} px, and data.min_side_px = {least_px}; replace it, or leave it out (`exclude`)"
        )
        findings.append(Finding("picture that is too small", Problem(str(pair.picture), what)))
    if findings:
        return None, findings
    wording = wording_of(pair.folder)
    caption, varied = worded(texts, wording)
    return Example(
        path=pair.picture,
        caption=caption,
        width_px=size[0],
        height_px=size[1],
        repeats=pair.repeats,
        loss_weight=pair.folder.loss_weight,
        resolution_px=next(iter(pair.folder.resolutions_px), 0),
        flip=pair.folder.flip,
        crops=pair.folder.crops,
        varied=varied,
        folder=index,
        beside=pair.beside,
        concept=pair.concept,
        num_lines=num_lines,
        has_trigger=any(holds_word(text, wording.trigger) for text in texts),
        look=look,
        mask=pair.mask,
        mask_look=mask_look,
    ), []


def _texts(pair: Pair) -> tuple[tuple[str, ...], int]:
    """Return the texts that a picture's caption holds, and how many lines it is written in. Raises CaptionError."""
    if pair.texts is not None or pair.caption is None:
        return pair.texts or (), int(bool(pair.texts))
    content = read_text(pair.caption)
    return texts_of(content, pair.folder.caption_lines), len(texts_of(content, "drawn"))


def _uncaptioned(pair: Pair) -> Problem:
    found = "its caption is empty" if pair.caption else "no caption"
    if pair.beside:
        return Problem(str(pair.picture), f"{found}, but {pair.beside}")
    match pair.folder.captions:
        case "txt" | "caption":
            where = f"in {pair.picture.with_suffix('.' + pair.folder.captions).name}"
        case "metadata":
            where = "for it in the metadata file"
        case "meta_cap":
            where = "for it in meta_cap.json"
    return Problem(str(pair.picture), f'{found}; write one {where}, or set missing_captions = "empty"')
