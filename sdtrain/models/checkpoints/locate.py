"""Finds where a model lies and in what layout, without torch and without the network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sdtrain.errors import user_error
from sdtrain.families.family import Family
from sdtrain.families.known import family_of_folder
from sdtrain.families.words import DENOISER, Component
from sdtrain.files.header import Header, read_header
from sdtrain.files.locations import BUILTIN, BUILTIN_FOLDER, location
from sdtrain.models.checkpoints.configs_from_shapes import detect_family
from sdtrain.models.checkpoints.hub import cached_model, is_hub_id, is_offline, not_cached

INDEX = "model_index.json"
STEMS: dict[Component, str] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in the original layout, all in one file."""

    header: Header
    family: Family

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.header.path


@dataclass(frozen=True)
class DiffusersFolder:
    """A checkpoint as diffusers writes it: a folder with one sub-folder for each part.

    variant: the infix of its weight files, such as `fp16`, or empty. index: the content of `model_index.json`.
    """

    path: Path
    variant: str
    family: Family
    index: Mapping[str, Any]


Checkpoint = SingleFile | DiffusersFolder


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model. Raises UserError when it is missing or not JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise user_error(str(path), path.name, "is missing; is this a whole model?") from None
    except OSError as error:
        raise user_error(str(path), path.name, f"cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise user_error(str(path), path.name, f"is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise user_error(str(path), path.name, "holds no JSON object; is this a whole model?")
    return content


def locate(path: str, variant: str, *, weights: bool = True) -> Path:
    """Return the file or folder that a model path means. Raises UserError when it is nowhere on this machine.

    weights: whether a model of the hub is needed with its weights, or only for its configs and tokenizers.
    """
    if is_hub_id(path):
        folder = cached_model(path, variant, weights=weights)
        if folder is None:
            reason = "the network is off" if is_offline() else "this command does not use the network"
            raise not_cached(path, variant, reason, weights=weights)
        return folder
    found = location(path)
    if found.exists():
        return found
    if path.startswith(BUILTIN):
        names = sorted(entry.name for entry in BUILTIN_FOLDER.iterdir() if (entry / INDEX).exists())
        raise user_error(path, "model.path", f"is not built in; there is {', '.join(BUILTIN + name for name in names)}")
    raise user_error(path, "model.path", "no such file or folder")


def open_checkpoint(path: Path, variant: str) -> Checkpoint:
    """Open what lies at a path. Raises UserError when it is no whole Stable Diffusion checkpoint."""
    if path.is_dir():
        index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
        return DiffusersFolder(path, variant, _folder_family(path, index), index)
    header = read_header(path)
    return SingleFile(header, detect_family(header))


def _folder_family(folder: Path, index: Mapping[str, Any]) -> Family:
    if not (folder / DENOISER).is_dir():
        raise user_error(str(folder), DENOISER, _what_folder(folder))
    unet = read_json(folder / DENOISER / "config.json")
    channels = unet.get("in_channels", 4)
    if channels != 4:
        raise user_error(
            str(folder / DENOISER / "config.json"),
            "in_channels",
            f"is {channels} instead of 4: an inpainting or editing model, which is not supported",
        )
    parts = {part.name for part in folder.iterdir() if part.is_dir()}
    if "text_encoder_2" in parts and "text_encoder" not in parts:
        raise user_error(str(folder), "text_encoder", "is missing: this is an SDXL refiner, or not a whole model")
    family = family_of_folder(parts, unet, str(index.get("_class_name", "")))
    if family is None:
        raise user_error(str(folder), INDEX, "has more text encoders than any family that is known here")
    return family


def _what_folder(folder: Path) -> str:
    files = sorted(entry.name for entry in folder.glob("*.safetensors"))
    if files:
        return f"is missing: this is no diffusers folder; did you mean the file {files[0]} in it?"
    return "is missing: this is not a diffusers folder (a folder with model_index.json, unet, vae, ...)"


def missing_parts(checkpoint: Checkpoint, *, own_vae: bool) -> list[str]:
    """Return the names of the networks that a checkpoint should have and has not.

    own_vae: whether the VAE must be in the checkpoint, because none is named on its own.
    """
    expected = [part for part in checkpoint.family.components if own_vae or part != "vae"]
    match checkpoint:
        case SingleFile(header, family):
            vae_there = any(name.startswith(family.vae_prefix) for name in header.entries)
            return [part for part in expected if part == "vae" and not vae_there]
        case DiffusersFolder(path):
            return [part for part in expected if not (path / part / "config.json").is_file()]


def weight_files(folder: Path, component: Component, variant: str) -> list[Path]:
    """Return the safetensors files of one part of a diffusers folder: a single one, or all shards.

    A part without the variant is read in its plain form, as long as the U-Net has it. Raises UserError otherwise.
    """
    stem = STEMS[component]
    found = _weight_files(folder, stem, variant)
    if not found and variant and component != DENOISER:
        found = _weight_files(folder, stem, "")
    if found:
        return found
    raise user_error(str(folder), _file_name(stem, variant), _other_weights(folder, stem))


def _file_name(stem: str, variant: str) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _weight_files(folder: Path, stem: str, variant: str) -> list[Path]:
    single = folder / _file_name(stem, variant)
    if single.is_file():
        return [single]
    index = folder / f"{stem}.safetensors.index{'.' + variant if variant else ''}.json"
    if not index.is_file():
        return []
    shards = cast(dict[str, str], read_json(index).get("weight_map", {}))
    return [folder / name for name in sorted(set(shards.values()))]


def _other_weights(folder: Path, stem: str) -> str:
    names = [entry.name for entry in folder.glob(f"{stem}*.safetensors")]
    variants = {
        match[1] for name in names if (match := re.match(rf"{stem}\.([^.]+?)(-\d+-of-\d+)?\.safetensors", name))
    }
    if variants:
        plain = " or leave model.variant empty" if f"{stem}.safetensors" in names else ""
        return f"is missing; set model.variant to {' or '.join(sorted(variants))}{plain}"
    if f"{stem}.safetensors" in names:
        return "is missing; only the plain files are there: leave model.variant empty"
    pickles = [entry.name for suffix in ("bin", "ckpt") for entry in folder.glob(f"*.{suffix}")]
    if pickles:
        return f"is missing; {pickles[0]} is a pickle, which can run any code: get the model as .safetensors"
    return "is missing; is this a whole model?"


def fallback_folder(components: str) -> Path | None:
    """Return the folder that `model.components` names, None without one. Raises UserError when it is nowhere."""
    return locate(components, "", weights=False) if components else None


def fallback_config(fallback: Path | None, component: Component) -> dict[str, Any] | None:
    """Return the configuration that the folder of `model.components` has for a network; None when it has none."""
    path = fallback / component / "config.json" if fallback else None
    return read_json(path) if path and path.is_file() else None
