"""Finds tokenizers beside a checkpoint, in a folder that the user names or in the hub cache; loads and copies them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdtrain.errors import printable, user_error
from sdtrain.families.family import Family
from sdtrain.files.writer import write_bytes
from sdtrain.models.checkpoints.hub import cached_file
from sdtrain.models.checkpoints.locate import Checkpoint, DiffusersFolder, SingleFile, read_json

if TYPE_CHECKING:
    from sdtrain.models.prompts import Tokenizer

TOKENIZER_FILES = ("vocab.json", "merges.txt")
WHOLE = "tokenizer.json"
"""All of a tokenizer in one file, which is read instead where it is there."""
BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
SDXL_REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0"
CLIP_REPOSITORY = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class TokenizerSource:
    """A folder with a CLIP tokenizer.

    pad_token: the padding to use instead of the tokenizer's own; empty keeps that.
    """

    folder: Path
    pad_token: str = ""


def find_tokenizers(checkpoint: Checkpoint, fallback: Path | None) -> tuple[TokenizerSource, ...]:
    """Return where the tokenizers of a checkpoint lie, one for each text encoder. Raises UserError with what to fetch.

    A single file has none: they come from the folder in `model.components` (`fallback`), or from the hub cache. All
    published models of these families share CLIP's vocabulary; the second encoder of SDXL differs in padding with
    "!".
    """
    found = _found_tokenizers(checkpoint, fallback)
    for source in dict.fromkeys(found):
        _require_readable(source.folder)
    return found


def _found_tokenizers(checkpoint: Checkpoint, fallback: Path | None) -> tuple[TokenizerSource, ...]:
    if fallback:
        return _named_tokenizers(fallback, checkpoint.family, "model.components")
    match checkpoint:
        case DiffusersFolder(path, _, family):
            return _named_tokenizers(path, family, "model.path")
        case SingleFile(_, family):
            return _cached_tokenizers(family)


def _require_readable(folder: Path) -> None:
    """Read the JSON files that a tokenizer is loaded from. Raises UserError for one that is damaged."""
    names = [WHOLE] if (folder / WHOLE).is_file() else ["vocab.json"]
    for name in (*names, *(name for name in BESIDE if (folder / name).is_file())):
        read_json(folder / name)


def _named_tokenizers(folder: Path, family: Family, setting: str) -> tuple[TokenizerSource, ...]:
    """Return the tokenizers in the folder itself, or in its sub-folders as a diffusers folder has them."""
    if has_tokenizer(folder):
        return _shared_tokenizer(folder, family)
    names = [encoder.tokenizer for encoder in family.text_encoders]
    for name in names:
        if not has_tokenizer(folder / name):
            raise user_error(str(folder / name), setting, f"has no tokenizer ({' and '.join(TOKENIZER_FILES)})")
    return tuple(TokenizerSource(folder / name) for name in names)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a CLIP tokenizer lies in a folder."""
    return (folder / WHOLE).is_file() or all((folder / name).is_file() for name in TOKENIZER_FILES)


def _shared_tokenizer(folder: Path, family: Family) -> tuple[TokenizerSource, ...]:
    return tuple(TokenizerSource(folder, encoder.pad_token) for encoder in family.text_encoders)


def _cached_tokenizers(family: Family) -> tuple[TokenizerSource, ...]:
    found = [_cached_tokenizer(SDXL_REPOSITORY, encoder.tokenizer + "/") for encoder in family.text_encoders]
    if all(found):
        return tuple(TokenizerSource(folder) for folder in found if folder)
    clip = _cached_tokenizer(CLIP_REPOSITORY, "")
    if clip:
        return _shared_tokenizer(clip, family)
    raise user_error(
        "tokenizers",
        "model.components",
        "a single file holds none: name a folder here with vocab.json and merges.txt of "
        f"{CLIP_REPOSITORY}, or fetch them once with `hf download {CLIP_REPOSITORY} vocab.json merges.txt "
        "tokenizer_config.json special_tokens_map.json`",
    )


def _cached_tokenizer(repository: str, below: str) -> Path | None:
    files = [cached_file(repository, below + name) for name in TOKENIZER_FILES]
    return files[0].parent if all(files) and files[0] else None


COPIED = (*TOKENIZER_FILES, WHOLE, *BESIDE, "added_tokens.json")


def copy_tokenizer(source: TokenizerSource, folder: Path) -> None:
    """Copy a tokenizer's files as they are; where its padding was changed, write a config that says so."""
    folder.mkdir()
    changed = bool(source.pad_token)
    if changed:
        tokenizer: Any = load_tokenizer(source)
        tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES if changed else COPIED:
        if (source.folder / name).is_file():
            write_bytes(folder / name, (source.folder / name).read_bytes())


def load_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Load a CLIP tokenizer from its folder. Raises UserError for one that is damaged."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    padding = {"pad_token": source.pad_token} if source.pad_token else {}
    try:
        return cast("Tokenizer", CLIPTokenizer.from_pretrained(source.folder, **padding))
    except Exception as error:  # noqa: BLE001 - the library raises whatever its parsers do, some of it plain Exception
        what = f"holds no CLIP tokenizer that can be read ({printable(str(error))[:100]}); fetch its files again"
        raise user_error(str(source.folder), source.folder.name, what) from None
