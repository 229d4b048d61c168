"""`sdtrain import-kohya`: makes a config of ours of those of sd-scripts and kohya_ss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdtrain.config.kohya.importing.convert import Imported, convert
from sdtrain.config.kohya.importing.options import read_foreign
from sdtrain.config.kohya.importing.outcomes import count_sorts
from sdtrain.data.pictures import SUFFIXES
from sdtrain.errors import user_error
from sdtrain.files.writer import atomic_file


def import_kohya(paths: Sequence[Path], out: Path | None) -> Imported:
    """Return what the files mean here; it is written to `out` if that is given. Raises UserError.

    The dataset config that a file names is read too, where it is there.
    """
    if out is not None and out.exists():
        raise user_error("import-kohya", "--out", f"{out} is there already; name another file, or remove it")
    foreign = read_foreign(paths)
    named = foreign.arguments.find("dataset_config")
    if named is not None and not foreign.subsets and isinstance(named.value, str) and Path(named.value).is_file():
        foreign = read_foreign([*paths, Path(named.value)])
    imported = convert(foreign, num_pictures)
    if out is not None:
        with atomic_file(out) as file:
            file.write(imported.text.encode("utf-8"))
    return imported


def num_pictures(folder: str) -> int | None:
    """Return how many pictures lie in a folder and below it, hidden ones left out; None where there is no folder."""
    root = Path(folder).expanduser()
    try:
        if not root.is_dir():
            return None
        return sum(
            path.suffix.lower() in SUFFIXES
            for path in root.rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(root).parts)
        )
    except (OSError, ValueError):  # locked, or no path at all: it has a zero byte
        return None


def imported_answer(imported: Imported, out: Path | None) -> dict[str, object]:
    """Return the new config and what became of each option, for programs."""
    options = [
        {"option": one.option.place, "value": one.option.value, "became": one.sort, "text": one.text}
        for one in imported.outcomes
    ]
    return {"written": None if out is None else str(out), "config": imported.text, "options": options}


def summary(imported: Imported) -> str:
    """Return how many options became what, in one line."""
    return ", ".join(f"{num} {sort}" for sort, num in count_sorts(imported.outcomes) if num)
