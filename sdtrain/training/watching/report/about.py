"""`about.json`: the machine, the versions and the pictures of a run's last sitting, which no other file of it tells."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from sdtrain.families.metadata import now
from sdtrain.files.writer import write_text

NAME = "about.json"
SHOWN = ("sdtrain", "torch", "diffusers", "transformers", "peft")
"""The packages whose versions decide what a run does."""


@dataclass(frozen=True)
class About:
    """What is told of a sitting, each a list of lines or of names and values."""

    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: str = ""
    """When the first sitting began, as `now` says it; empty where that is not known."""


@dataclass(frozen=True)
class Told:
    """What the user was told before the run began: of the pictures, and what was worth a look; a line each."""

    pictures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


NOTHING = Told()


def about_now(device: str, dtype: str, told: Told) -> About:
    """Return what is so on this machine now. device: what is computed on, in words. No torch is imported."""
    machine = {
        "device": device,
        "precision": dtype,
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processors": str(os.cpu_count() or "unknown"),
    }
    versions = {"python": platform.python_version()}
    for name in SHOWN:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return About(machine, versions, list(told.pictures), list(told.notes), now())


def write_about(folder: Path, about: About) -> None:
    """Write what is told into a run's folder, whole or not at all. Raises UserError.

    When the run began stays as it stands there.
    """
    about = replace(about, started=read_about(folder).started or about.started)
    write_text(folder / NAME, json.dumps(asdict(about), indent=2) + "\n")


def read_about(folder: Path) -> About:
    """Return what was written; nothing where there is no such file, or a damaged one."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return About()
    if not isinstance(content, dict):
        return About()
    return About(
        _names(content.get("machine")),
        _names(content.get("versions")),
        _texts(content.get("pictures")),
        _texts(content.get("notes")),
        str(content.get("started") or ""),
    )


def _names(value: Any) -> dict[str, str]:
    return {str(key): str(text) for key, text in value.items()} if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [str(text) for text in value] if isinstance(value, list) else []
