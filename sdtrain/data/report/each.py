"""What is worth a look in each single picture: the notes of the whole set, told beside the pictures they are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.buckets import Placement
from sdtrain.data.captions.literal import has_words, literal_signs
from sdtrain.data.examples import Example
from sdtrain.data.report.alike import find_alike
from sdtrain.data.report.notes import HARD_CROP
from sdtrain.data.report.summary import summarise


@dataclass(frozen=True)
class Note:
    """What is worth a look in a picture. other: the picture that it is compared with; None: it stands for itself."""

    text: str
    other: Path | None = None


def notes_of_each(
    trained: Sequence[Example], held_out: Sequence[Example], config: DataConfig, validated: Sequence[FolderConfig]
) -> dict[Path, list[Note]]:
    """Return the notes on each picture, by its path; pictures without any are left out.

    validated: the folders that the held-out pictures are in; those of `config` where a share of them is held out.
    """
    notes: dict[Path, list[Note]] = {example.path: [] for example in (*trained, *held_out)}
    for examples, folders in ((trained, config.folder), (held_out, validated)):
        if not examples:
            continue
        report = summarise(examples, config)
        moved = {example.path for example, _ in report.moved}
        alone = {example.path for example in report.alone} if config.batch_size > 1 and examples is trained else set()
        for share, example in report.crops:
            if share >= HARD_CROP:
                notes[example.path].append(Note(f"cropped hard: {share:.0%}"))
        for factor, example in report.upscales:
            notes[example.path].append(Note(f"enlarged: {factor:.2f}x"))
        for example in examples:
            told = notes[example.path]
            told += [Note("moved to this size, because it was alone in its own")] if example.path in moved else []
            told += [Note("alone in its batch: no other picture has its size")] if example.path in alone else []
            told += _of_picture(example) + _of_caption(example, folders[example.folder])
    for path, note in _copies([*trained, *held_out]):
        notes[path].append(note)
    return {path: told for path, told in notes.items() if told}


def scale_text(placement: Placement) -> str:
    """Return how a picture goes into its bucket, in words."""
    (width, height), (scaled_width, scaled_height) = placement.original, placement.scaled
    text = f"{width}x{height} scaled to {scaled_width}x{scaled_height}"
    if placement.upscale > 1:
        text += f" (enlarged {placement.upscale:.2f}x)"
    if placement.flipped:
        text += ", flipped"
    if not placement.cropped_share:
        return text + ", whole"
    return f"{text}, from {placement.crop_left},{placement.crop_top}: {placement.cropped_share:.1%} cropped away"


def _of_picture(example: Example) -> list[Note]:
    is_clear = example.look is not None and example.look.has_clear_parts
    return [Note("on white: it has transparent parts, which become white")] if is_clear else []


def _of_caption(example: Example, folder: FolderConfig) -> list[Note]:
    notes = []
    if not example.caption or not example.num_lines:
        filled = ", but for what its folder adds" if example.caption else ""
        hint = f"; {example.beside}" if example.beside else ""
        notes.append(Note(f"no caption{filled}{hint}"))
    elif not has_words(example.caption):
        notes.append(Note("no words: a caption without a letter"))
    signs = literal_signs(example.caption, wildcards=folder.wildcards)
    if signs:
        notes.append(Note("trained as words: " + ", ".join(f"{sign} ({what})" for what, sign in signs.items())))
    if example.num_lines > 1 and folder.caption_lines == "joined":
        notes.append(Note(f"lines: {example.num_lines} lines of its caption are joined into one"))
    return notes


def _copies(examples: Sequence[Example]) -> list[tuple[Path, Note]]:
    """Each picture of a group with a note on the first of it, the first with one on the second; also across a split."""
    found = []
    for group in find_alike(examples):
        what = "the same file as" if group.is_exact else "nearly the same picture as"
        for example in group.examples:
            other = next(one for one in group.examples if one.path != example.path)
            across = ", which is held out" if other.held_out and not example.held_out else ""
            across = ", which is trained on" if example.held_out and not other.held_out else across
            found.append(
                (example.path, Note(f"copy: {what} {other.path.parent.name}/{other.path.name}{across}", other.path))
            )
    return found
