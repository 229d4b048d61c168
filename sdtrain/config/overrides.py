"""`--set KEY=VALUE`: changes settings on the command line, and tells which mistakes come from there."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sdtrain.config.paths import Location, begins_with, holds, path_text, split_path
from sdtrain.errors import Problem

Table = dict[str, Any]
MOST_SHOWN = 80
"""The length of the longest KEY=VALUE that is shown whole."""


@dataclass(frozen=True)
class Override:
    """One setting that was changed on the command line. text: the KEY=VALUE as it was given."""

    text: str
    setting: Location
    value: Any

    @property
    def place(self) -> str:
        """The name of the override in errors."""
        return place_of(self.text)


def place_of(text: str) -> str:
    """Return `--set KEY=VALUE` on one line, cut where it is long."""
    line = " ".join(text.split())
    return f"--set {line if len(line) <= MOST_SHOWN else line[: MOST_SHOWN - 3] + '...'}"


def read_override(text: str) -> Override | Problem:
    """Return the override in a `KEY=VALUE` text, or what is wrong with the text."""
    found = split_path(text)
    if found and found[1].startswith("="):
        return Override(text, found[0], _value(found[0], found[1][1:].strip()))
    return Problem(place_of(text), _not_an_override(text))


def apply_overrides(table: Mapping[str, Any], texts: Sequence[str]) -> tuple[Table, list[Override], list[Problem]]:
    """Put `KEY=VALUE` texts into a copy of a table, one after the other.

    Returns the changed table, the overrides that went in, and what is wrong with the others.
    """
    changed = deepcopy(dict(table))
    applied: list[Override] = []
    problems: list[Problem] = []
    for override in map(read_override, texts):
        if isinstance(override, Problem):
            problems.append(override)
        elif reason := _cannot_go_in(changed, override.setting):
            problems.append(Problem(override.place, reason))
        else:
            _put(changed, override.setting, deepcopy(override.value))
            applied.append(override)
    return changed, applied, problems


def responsible(overrides: Sequence[Override], plain: Mapping[str, Any], location: Location) -> Override | None:
    """Return the override that a problem at a location comes from, None when it is the file's. plain: the file's table.

    Something missing is blamed on whoever made the table that lacks it: where the file has none of that table, an
    override did. And a setting that an override changed in part is no longer what the file said.
    """
    for override in reversed(overrides):
        if begins_with(location, override.setting):
            return override
    made = next((location[:end] for end in range(1, len(location)) if not holds(plain, location[:end])), location)
    inside = [override for override in overrides if begins_with(override.setting, made)]
    return inside[-1] if inside else None


def _not_an_override(text: str) -> str:
    key = text.partition("=")[0]
    if "=" in text and key.strip() and set(key) & set("[]\"'"):
        return (
            "the name cannot be read; places in lists are whole numbers from 0, as in data.folder[0].repeats=2, and "
            "a key that holds dots or brackets stands in quotes"
        )
    return "write it as key=value, for example steps=500 or preview.every=100"


def _value(setting: Location, text: str) -> Any:
    if setting == ("steps",) and text.startswith("+"):
        return text  # so many more, which TOML would read as so many
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: --set name=cats


def _cannot_go_in(table: Mapping[str, Any], setting: Location) -> str:
    """Return why nothing can be put at a location; empty when it can. The index after a list's last is free."""
    value: Any = table
    for depth, part in enumerate(setting):
        here = f"`{path_text(setting[:depth])}`"
        if isinstance(part, int):
            if not isinstance(value, list):
                return f"{here} is not a list in the config"
            if part > len(value):
                return f"{here} has {_entries(len(value))}; [{len(value)}] would add one"
            if part == len(value):
                return _out_of_nothing(setting, depth + 1)
        elif isinstance(value, list):
            return f"{here} is a list in the config; say which entry, as in {path_text((*setting[:depth], 0, part))}"
        elif not isinstance(value, dict):
            return f"{here} is not a table in the config"
        elif part not in value:
            return _out_of_nothing(setting, depth + 1)
        value = value[part]
    return ""


def _out_of_nothing(setting: Location, depth: int) -> str:
    """Return the same where nothing stands yet: a new list begins with its first entry."""
    for at in range(depth, len(setting)):
        if isinstance(setting[at], int) and setting[at] != 0:
            return f"`{path_text(setting[:at])}` has no entries; [0] would add one"
    return ""


def _entries(count: int) -> str:
    return {0: "no entries", 1: "one entry, [0]"}.get(count, f"{count} entries, [0] to [{count - 1}]")


def _put(table: Table, setting: Location, new: Any) -> None:
    value: Any = table
    for part, after in pairwise(setting):
        empty: Any = [] if isinstance(after, int) else {}
        if isinstance(part, int):
            if part == len(value):
                value.append(empty)
            value = value[part]
        else:
            value = value.setdefault(part, empty)
    last = setting[-1]
    if isinstance(last, int) and last == len(value):
        value.append(new)
    else:
        value[last] = new
