"""Whether a file may be written where a person said."""

from __future__ import annotations

from pathlib import Path

from sdtrain.errors import user_error
from sdtrain.files.writer import require_place

SUFFIX = ".safetensors"


def require_free(path: Path, *, force: bool, folder: bool = False) -> None:
    """Refuse, before any work, what is there already, unless it is to be replaced, and where nothing can be written.

    folder: whether a folder will be written. Raises UserError.
    """
    require_place(path, folder=folder)
    if not folder and path.suffix.lower() != SUFFIX:
        what = f"would be a safetensors file, whatever it is called; choose a name that ends in {SUFFIX}"
        raise user_error(str(path), path.name, what)
    if path.exists() and not force:
        raise user_error(str(path), path.name, "is there already; add --force to replace it, or choose another --out")
