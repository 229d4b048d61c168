"""What long work calls to say how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Is called with what is done, how many of it are through, and of how many."""


def unseen(what: str, done: int, total: int) -> None:
    """Show nobody how far it is."""
