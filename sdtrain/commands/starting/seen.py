"""What there is before the first run: pictures with their captions, models, and the memory of the card. No torch."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdtrain.config.schema import ModelConfig
from sdtrain.data.captions.tables import META_CAP_NAME, METADATA_NAMES
from sdtrain.data.examples import BUILTIN_FOLDERS
from sdtrain.data.masks.places import MARK
from sdtrain.data.scanning.concepts import concept_of
from sdtrain.data.scanning.files import files_below
from sdtrain.data.scanning.pair import is_picture
from sdtrain.families.words import DENOISER, LATENT_FACTOR_PX
from sdtrain.models.checkpoints.hub import cached_model
from sdtrain.models.checkpoints.inspect import OpenedModel, inspect_model, network_config

Captions = Literal["txt", "caption", "metadata", "meta_cap"]
FIRST_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
"""The model that is suggested where it is in the hub cache."""
USUAL_FOLDERS = ("pictures", "images", "dataset", "data", "img", "train")
MOST_MODELS = 8
"""The most model files of a folder that are opened."""


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures, as it is before anything is said of it.

    captions: where most of the captions stand. num_captioned: how many pictures have one there; of a table it is
    taken that it has one for each. concepts: the names of folders such as `10_sks dog` stand for captions.
    """

    path: str
    num: int
    captions: Captions = "txt"
    num_captioned: int = 0
    concepts: bool = False
    has_masks: bool = False
    is_there: bool = True


def pictures_in(path: str) -> Pictures:
    """Return what stands in a folder of pictures and below it. Raises OSError where it cannot be read."""
    root = BUILTIN_FOLDERS.get(path, Path(path).expanduser())
    files, _ = files_below(root, ())
    there = set(files)
    pictures = [file for file in files if is_picture(file)]
    masks = {file for file in pictures if file.stem.endswith(MARK)}
    pictures = [file for file in pictures if file not in masks]
    beside: dict[Captions, int] = {
        "txt": sum(file.with_suffix(".txt") in there for file in pictures),
        "caption": sum(file.with_suffix(".caption") in there for file in pictures),
    }
    kind = max(beside, key=lambda one: beside[one])
    num_captioned = beside[kind]
    if not num_captioned and any(file.name in METADATA_NAMES for file in files):
        kind, num_captioned = "metadata", len(pictures)
    elif not num_captioned and root / META_CAP_NAME in there:
        kind, num_captioned = "meta_cap", len(pictures)
    concepts = not num_captioned and bool(pictures) and all(concept_of(file, root) for file in pictures)
    return Pictures(path, len(pictures), kind, num_captioned, concepts, bool(masks), root.is_dir())


def picture_folders_here(folder: Path) -> list[str]:
    """Return the folders in a folder that hold pictures, those with usual names first."""
    found = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and _holds_pictures(entry)]
    order = {name: index for index, name in enumerate(USUAL_FOLDERS)}
    found.sort(key=lambda entry: order.get(entry.name.lower(), len(order)))
    return [str(entry if folder != Path() else entry.name) for entry in found]


def _holds_pictures(folder: Path) -> bool:
    """Return whether pictures stand in a folder, or in one of its own folders."""
    if folder.name.startswith(".") or (folder / "log.jsonl").exists():
        return False
    try:
        return any(is_picture(file) for file in (*folder.iterdir(), *folder.glob("*/*")))
    except OSError:
        return False


def models_here(folder: Path) -> list[str]:
    """Return the models that can be trained: files in a folder and in its `models`, then SDXL in the hub cache."""
    files = [*sorted(folder.glob("*.safetensors")), *sorted((folder / "models").glob("*.safetensors"))][:MOST_MODELS]
    found = [str(file) for file in files if opened_model(str(file)) is not None]
    return found + ([FIRST_SDXL] if cached_model(FIRST_SDXL, "") else [])


def opened_model(path: str) -> OpenedModel | None:
    """Return a model that can be trained, opened; None where it cannot, or is not on this machine."""
    try:
        opened, problems = inspect_model(ModelConfig(path=path))
    except ValueError:  # no path at all, which the settings tell
        return None
    return None if problems else opened


def resolution_of(opened: OpenedModel) -> int:
    """Return the side of the square pictures that a model was made for, in pixels."""
    size = network_config(opened.checkpoint, DENOISER, opened.fallback).get("sample_size")
    if isinstance(size, int) and size > 0:
        return size * LATENT_FACTOR_PX
    return max(opened.family.native_resolution(predicts_v=opened.prediction == "v_prediction"))


def card_memory_gib() -> float | None:
    """Return the memory of the smallest NVIDIA card of this machine; None where there is none that tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        return min(float(line) for line in answer.split()) / 1024
    except (OSError, subprocess.SubprocessError, ValueError):  # ValueError: it says [N/A], or nothing
        return None
