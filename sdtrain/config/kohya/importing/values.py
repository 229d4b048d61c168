"""Reads single values, which kohya_ss writes as text as often as not: "1e-4", "1024,1024", "True", ""."""

from __future__ import annotations

import math
import re
import shlex
from typing import Any

MOST_COUNTED = 1_000_000_000
"""The most steps, pictures or anything else that is counted."""


class UnreadableError(Exception):
    """A value is not what its option takes; the message says what that would be."""


def is_unset(value: Any) -> bool:
    """Return whether a value says nothing: kohya_ss writes an empty text for it."""
    return value is None or (isinstance(value, str) and value.strip() in ("", "None"))


def is_off(value: Any) -> bool:
    """Return whether a value switches its option off, or says nothing."""
    if is_unset(value) or (isinstance(value, str) and value.strip().lower() in ("false", "none", "no", "off")):
        return True
    return (isinstance(value, list | dict) and not value) or as_number(value) == 0 or value is False


def as_number(value: Any) -> float | None:
    """Return a finite number, also from text; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except (ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def number(value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> float:
    """Return a number within bounds. Raises UnreadableError."""
    read = as_number(value)
    if read is None or not least <= read <= most or read <= above:
        raise UnreadableError(f"a number{_bounds(above, least, most)}")
    return read


def whole(value: Any) -> int:
    """Return a whole number from 0 on. Raises UnreadableError."""
    return _whole(value, 0, 2**62, "a whole number from 0 on")


def count(value: Any) -> int:
    """Return a whole number from 1 on, within what is counted here. Raises UnreadableError."""
    return _whole(value, 1, MOST_COUNTED, f"a whole number from 1 to {MOST_COUNTED:,}")


def _whole(value: Any, least: int, most: int, allowed: str) -> int:
    read = as_number(value)
    if read is None or not read.is_integer() or not least <= read <= most:
        raise UnreadableError(allowed)
    return int(read)


def flag(value: Any) -> bool:
    """Return whether an option is on. Raises UnreadableError."""
    if isinstance(value, bool):
        return value
    if is_off(value):
        return False
    if as_number(value) is not None or (isinstance(value, str) and value.strip().lower() in ("true", "yes", "on")):
        return True
    raise UnreadableError("true or false")


def text(value: Any) -> str:
    """Return a text that is not empty. Raises UnreadableError."""
    if not isinstance(value, str) or is_unset(value):
        raise UnreadableError("a text")
    return value.strip()


def numbers(value: Any) -> list[float]:
    """Return the numbers in a list, or in a text such as "0.9,0.99", "[0.9, 0.99]" or "1e-4 1e-5".

    Raises UnreadableError if there is none, or something else among them.
    """
    parts = re.split(r"[\s,]+", value.strip(" \t\n()[]")) if isinstance(value, str) else value
    read = [as_number(part) for part in (parts if isinstance(parts, list) else [parts])]
    found = [one for one in read if one is not None]
    if not found or len(found) < len(read):
        raise UnreadableError("one number or several")
    return found


def words(value: Any) -> list[str]:
    """Return the `name=value` texts of an option such as network_args: a list of them, or one text of them all."""
    if isinstance(value, list):
        return [str(word) for word in value]
    try:
        return shlex.split(str(value))
    except ValueError:  # a quote without its pair
        return str(value).split()


def _bounds(above: float, least: float, most: float) -> str:
    bounds = [
        f"above {above:g}" if above > -math.inf else "",
        f"from {least:g} on" if least > -math.inf else "",
        f"up to {most:g}" if most < math.inf else "",
    ]
    said = ", ".join(bound for bound in bounds if bound)
    return f" {said}" if said else ""
