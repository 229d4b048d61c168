"""Turns a TOML file into a Config, or into one error that lists everything that is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrain.config.draft import Draft, Written, draft_of
from sdtrain.config.overrides import Table, apply_overrides, read_override
from sdtrain.config.paths import Location, path_text, read_toml
from sdtrain.config.schema import Config
from sdtrain.config.text.lines import Lines, lines_of
from sdtrain.config.text.recipes import config_file
from sdtrain.errors import Problem, UserError, user_error

_PLACE = re.compile(r" \(at line (\d+), column (\d+)\)")
"""Where tomllib says that a text is no TOML."""


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config in a TOML file, with `key=value` overrides and the preset's values filled in.

    Raises UserError with every problem found: syntax, unknown keys, wrong types, values out of range, impossible
    pairs.
    """
    return read_draft(path, overrides).require_sound()


def read_draft(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """Return what a TOML file with `key=value` overrides means, as far as it can be told.

    Raises UserError only where there is nothing to go on with: no such file, or no TOML.
    """
    return draft_of(read_written(path, overrides))


def read_written(path: Path, overrides: Sequence[str] = ()) -> Written:
    """Return the plain table in a TOML file and the one that overrides make of it.

    Raises UserError as `read_draft` does.
    """
    try:
        plain, lines = read_table_and_lines(path)
    except UserError as error:
        unreadable = [read for read in map(read_override, overrides) if isinstance(read, Problem)]
        raise UserError(error.source, [*error.problems, *unreadable]) from None
    return overridden(plain, str(path), overrides, lines)


def overridden(plain: Table, source: str, overrides: Sequence[str], lines: Lines | None = None) -> Written:
    """Return a plain table that was read from `source`, and the one that `key=value` overrides make of it.

    lines: where in the source each setting stands.
    """
    table, applied, problems = apply_overrides(plain, overrides)
    return Written(source, plain, table, tuple(applied), tuple(problems), lines or {})


def read_table(path: Path) -> Table:
    """Return the plain table in a TOML file, or in the recipe that `builtin:NAME` means.

    Raises UserError where there is no such file, or no TOML in it.
    """
    return read_table_and_lines(path)[0]


def read_table_and_lines(path: Path) -> tuple[Table, Lines]:
    """Return the plain table in a TOML file, and the line of each setting. Raises UserError as `read_table` does."""
    content = ""
    try:
        content = config_file(path).read_text(encoding="utf-8")
        return read_toml(content), lines_of(content)
    except FileNotFoundError:
        raise user_error(str(path), "file", "no such file") from None
    except IsADirectoryError:
        raise user_error(str(path), "file", "is a folder; name a .toml file") from None
    except UnicodeDecodeError:
        raise user_error(str(path), "file", "is not text in UTF-8") from None
    except OSError as error:
        raise user_error(str(path), "file", f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        if content.lstrip().startswith("{"):
            what = "is JSON, but a config is TOML; `sdtrain import-kohya FILE` makes one of a file of kohya"
            raise user_error(str(path), "syntax", what) from None
        raise UserError(str(path), [_no_toml(str(error), content)]) from None


def _no_toml(what: str, content: str) -> Problem:
    """Return the problem that a text is no TOML. what: what tomllib says of it, with the place."""
    line = content.count("\n") + 1 if what.endswith("(at end of document)") else None
    if place := _PLACE.search(what):
        what, line = what.replace(place[0], f" at column {place[2]}"), int(place[1])
    return Problem("syntax", f"{what}; strings stand in quotes, `true` and `false` are lower case", line=line)


def resolve(table: Table, source: str, overrides: Sequence[str] = (), lines: Lines | None = None) -> Config:
    """Return the Config that a table means with overrides, preset filled in.

    lines: where in the source each setting stands. Raises UserError with everything that is wrong, naming `source` and
    the overrides.
    """
    return draft_of(overridden(table, source, overrides, lines)).require_sound()


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], above: Location = ()
) -> list[tuple[str, Any, Any]]:
    """Return (setting, value before, value after) for everything that differs between two resolved configs."""
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        found += _differences_of(before.get(key), after.get(key), (*above, key))
    return found


def _differences_of(old: Any, new: Any, setting: Location) -> list[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return differences(old, new, setting)
    if _are_tables(old) and _are_tables(new) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [found for index, pair in pairs for found in differences(*pair, (*setting, index))]
    return [(path_text(setting), old, new)] if old != new else []


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)
