"""Finds a VAE that is named on its own: a folder, or a file in either layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.errors import user_error
from sdtrain.families.family import Family
from sdtrain.families.original_names import Place, new_vae_name, places_of
from sdtrain.files.header import Header, read_header
from sdtrain.models.checkpoints.configs_from_shapes import UNLIKE, config_of, vae_config
from sdtrain.models.checkpoints.locate import locate, read_json, weight_files


@dataclass(frozen=True)
class VaeSource:
    """Where a VAE lies: the headers of its files, its configuration and how its tensors are named.

    prefix: what names in the original layout begin with; None for diffusers' own names.
    """

    headers: tuple[Header, ...]
    config: dict[str, Any]
    prefix: str | None


def vae_source(path: str, variant: str, family: Family) -> VaeSource:
    """Return the VAE that a setting names. Raises UserError when there is none.

    A folder is the VAE's own or a whole model's; a file may be a VAE or a checkpoint with one in it.
    """
    found = locate(path, variant)
    if found.is_dir():
        folder = found / "vae" if (found / "vae").is_dir() else found
        headers = tuple(read_header(file) for file in weight_files(folder, "vae", variant))
        return VaeSource(headers, read_json(folder / "config.json"), None)
    return _file_source(read_header(found), family)


def _file_source(header: Header, family: Family) -> VaeSource:
    for prefix in (family.vae_prefix, ""):
        if prefix + "encoder.down.0.block.0.conv1.weight" in header.entries:
            return VaeSource((header,), config_of(header, family, "vae", prefix), prefix)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in header.entries:
        return VaeSource((header,), _lone_config(header, family), None)
    raise user_error(
        str(header.path),
        family.vae_prefix + "encoder.*",
        "is missing: this is neither a VAE nor a checkpoint with one in it",
    )


def _lone_config(header: Header, family: Family) -> dict[str, Any]:
    """Return the configuration of a file in diffusers' names.

    It is the one that lies beside the file, or the one that follows from the shapes.
    """
    beside = Path(header.path).parent / "config.json"
    if beside.is_file():
        return read_json(beside)
    names = {new_vae_name(name): name for name in header.entries}
    places: dict[str, Place] = places_of(family, "vae", names)
    shapes = {
        place.key.removeprefix(family.vae_prefix): header.entries[names[name]].shape for name, place in places.items()
    }
    try:
        return vae_config(shapes, family)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        raise user_error(str(header.path), "vae", UNLIKE.format(family.title)) from None
