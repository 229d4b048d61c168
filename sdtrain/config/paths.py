"""A setting's name in two forms: as text, `data.folder[0].path`, and as a location, ("data", "folder", 0, "path")."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

Location = tuple[str | int, ...]

DEEPEST = 32
"""The most tables and lists inside one another; the settings need five."""
TOO_DEEP = f"tables or lists stand in one another more than {DEEPEST} deep"
TOO_LONG = "a whole number does not fit 64 bits"

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_KEY = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[^.\[\]=]+)\s*""")
_INDEX = re.compile(r"\[([0-9]{1,9})\]\s*")


def path_text(location: Location) -> str:
    """Return a location as errors print it and `--set` reads it; keys with odd characters are quoted, as in TOML."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{toml_key(part)}" if text else toml_key(part)
    return text or "config"


def split_path(text: str) -> tuple[Location, str] | None:
    """Return the location that a text begins with, and what follows it; None when it does not begin with one.

    Keys without quotes may hold anything but dots, brackets and `=`, so that `method.ranks.*attn2*` needs none.
    """
    location: list[str | int] = []
    position = 0
    while match := _KEY.match(text, position):
        key = plain_key(match[1])
        if key is None:
            return None
        location.append(key)
        position = match.end()
        while index := _INDEX.match(text, position):
            location.append(int(index[1]))
            position = index.end()
        if text[position : position + 1] != ".":
            return tuple(location), text[position:]
        position += 1
    return None


def location_of(where: str) -> Location:
    """Return the location that an error names; for what is no setting, such as a file, a location of a single key."""
    found = split_path(where)
    return found[0] if found and not found[1] else (where,)


def begins_with(location: Location, start: Location) -> bool:
    """Return whether a location is `start` or lies inside it."""
    return location[: len(start)] == start


def holds(table: Mapping[str, Any], location: Location) -> bool:
    """Return whether a plain table has something at a location."""
    value: Any = table
    for part in location:
        if isinstance(part, int):
            if not isinstance(value, list) or part >= len(value):
                return False
        elif not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def order_in(table: Mapping[str, Any], location: Location) -> tuple[float, ...]:
    """Return a key that sorts locations as they stand in a table.

    What is missing comes last in its section, and a whole comes after its parts.
    """
    order: list[float] = []
    value: Any = table
    for part in location:
        if isinstance(part, int) and isinstance(value, Sequence) and part < len(value):
            order.append(part)
        elif isinstance(value, Mapping) and part in value:
            order.append(list(value).index(part))
        else:
            break
        value = value[part]
    return (*order, float("inf"))


def toml_key(key: str) -> str:
    """Return a key as TOML writes it, quoted where it must be."""
    return key if _BARE.fullmatch(key) else toml_string(key)


def toml_string(text: str) -> str:
    """Return a text as a basic string of TOML, with its quotes."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(text: str) -> dict[str, Any]:
    """Return the plain table in a TOML text.

    Raises ValueError, as a sentence, for what is no TOML, and for tables and numbers that are far beyond any setting:
    they are deeper than DEEPEST, or do not fit 64 bits, as TOML demands.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # what Python says of numbers with thousands of digits is advice for programmers
        raise ValueError(TOO_LONG) from None
    waiting: list[tuple[Any, int]] = [(table, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(TOO_DEEP)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(TOO_LONG)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(one, depth + 1) for one in inner]
    return table


def plain_key(written: str) -> str | None:
    """Return the key that is written bare or in quotes; None where it is none."""
    if written[0] not in "\"'" or len(written) < 2 or written[-1] != written[0]:
        return written.strip() or None
    try:
        return next(iter(read_toml(f"{written} = 0")))
    except ValueError:
        return None
