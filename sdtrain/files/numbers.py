"""Numbers in files that other people may have written; no torch."""

from __future__ import annotations

from typing import TypeGuard

LARGEST = 1e300
"""What is larger was not written by us, and cannot be counted with."""


def is_number(value: object) -> TypeGuard[float]:
    """Return whether JSON had a number there, neither true nor false, that can be shown and counted with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
