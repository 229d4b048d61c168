"""Whether a file may be written where a person said."""

from __future__ import annotations

from pathlib import Path

from sdtrain.errors import user_error


def require_free(path: Path, *, force: bool) -> None:
    """Refuse what is there already, unless it is to be replaced; the writer replaces only files by files.

    Raises UserError.
    """
    if path.exists() and not force:
        raise user_error(str(path), path.name, "is there already; add --force to replace it, or choose another --out")
