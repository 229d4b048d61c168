"""`sdtrain init`: asks for what cannot be inferred, and writes a first config that passes `check`. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from sdtrain.commands.starting.first_config import Seen, Wishes, first_config, look, name_of
from sdtrain.commands.starting.seen import card_memory_gib, models_here, picture_folders_here, pictures_in
from sdtrain.config.draft import draft_of
from sdtrain.config.paths import read_toml
from sdtrain.config.read import overridden
from sdtrain.data.examples import scan_folders
from sdtrain.errors import UserError, user_error
from sdtrain.files.writer import write_text
from sdtrain.models.checkpoints.hub import is_missing
from sdtrain.training.start import inspect_run
from sdtrain.training.watching.text import say, shell_word

Ask: TypeAlias = Callable[[str, str], str]
"""Asks a person a question; returns the answer, or what is taken where there is none: the second."""


def init(where: Path, wishes: Wishes, console: Console, *, force: bool, ask: Ask | None) -> Path:
    """Write a first config and return where it is. Raises UserError with all that is missing or wrong.

    where: the .toml file to write, a folder of pictures, or the folder to write into. force: whether a file that is
    there is replaced. ask: asks for what was not wished for; None: it is inferred, and what cannot be is told.
    """
    if where.suffix != ".toml" and not wishes.pictures and _is_of_pictures(where):
        wishes, where = replace(wishes, pictures=str(where)), Path()
    folder = where.parent if where.suffix == ".toml" else where
    wishes = _completed(wishes, folder, ask)
    if where.suffix == ".toml":
        wishes = replace(wishes, name=wishes.name or name_of(replace(wishes, trigger=where.stem)))
        file = where
    else:
        file = where / f"{name_of(wishes)}.toml"
    if file.exists() and not force:
        raise user_error("init", str(file), "is there already; add --force to replace it, or name another file")
    seen = look(wishes, "init")
    text = first_config(wishes, seen, shell_word(file))
    _require_sound(text, str(file))
    write_text(file, text)
    say(console, *_done(file, text, seen))
    return file


def _is_of_pictures(folder: Path) -> bool:
    if str(folder).startswith("~"):  # which a config would take for somebody's home
        return False
    return folder != Path() and folder.is_dir() and pictures_in(str(folder)).num > 0


def _completed(wishes: Wishes, folder: Path, ask: Ask | None) -> Wishes:
    """Return the wishes with what was asked for, or else with what is there."""
    if not wishes.pictures:
        there = picture_folders_here(folder) if folder.is_dir() else []
        found = there[0] if there and (ask or len(there) == 1) else ""
        wishes = replace(wishes, pictures=ask("Which folder are the pictures in?", found) if ask else found)
    if not wishes.model:
        models = models_here(folder)
        others = f" Here are {', '.join(models)}." if len(models) > 1 else ""
        found = models[0] if models else ""
        what = f"Which model? A .safetensors file, a diffusers folder or a hub id.{others}"
        wishes = replace(wishes, model=ask(what, found) if ask else found)
    if ask is None:
        return wishes
    if not wishes.trigger:
        what = "Which word is to stand for what the pictures show? None, if the captions say it all."
        wishes = replace(wishes, trigger=ask(what, ""))
    if wishes.memory_gib is None and card_memory_gib() is None:
        answer = ask("How many GB of memory does the graphics card have?", "12")
        wishes = replace(wishes, memory_gib=memory_of(answer))
    return wishes


def memory_of(text: str) -> float:
    """Return the memory that a text such as `12` or `12GB` means. Raises UserError where it means none."""
    number = text.strip().lower().removesuffix("gib").removesuffix("gb").strip()
    if number.replace(".", "", 1).isdecimal() and 1 <= float(number) <= 10_000:
        return float(number)
    raise user_error("init", "--memory", f"{text!r} is no size of a card's memory; write 12 or 12GB")


def _require_sound(text: str, source: str) -> None:
    """Raise UserError with all that `check` would find in a config; a model that will be fetched is left out."""
    draft = draft_of(overridden(read_toml(text), source, ()))
    if not draft.is_sound or not is_missing(draft.config.model):
        inspect_run(draft, decode=False)
        return
    _, problems = scan_folders(draft.config.data, decode=False)
    if problems:
        raise UserError(source, problems)


def _done(file: Path, text: str, seen: Seen) -> list[str]:
    config = draft_of(overridden(read_toml(text), str(file), ())).config
    lines = [f"wrote {file}: {seen.pictures.num:,} pictures, {config.steps} steps; the comments in it say why"]
    if seen.resolution_px is None:
        lines.append(
            f"{config.model.path} is not on this machine yet: fit fetches it, and pictures are taken for SDXL's"
        )
    return [*lines, f"next: sdtrain fit {shell_word(file)}"]
