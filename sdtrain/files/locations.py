"""Finds the things that a config names: inside the package, or where the path says."""

from __future__ import annotations

from pathlib import Path

BUILTIN = "builtin:"
BUILTIN_FOLDER = Path(__file__).resolve().parents[1] / "builtin"


def location(path: str) -> Path:
    """Return the file or folder of a path in a config; `builtin:NAME` is inside the package, `~` is the user's home."""
    if path.startswith(BUILTIN):
        return BUILTIN_FOLDER / path.removeprefix(BUILTIN)
    return Path(path).expanduser()
