"""Imports go down only, siblings never import one another, and no room is too full to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "errors": 0,
    "files": 1,
    "families": 1,
    "diffusion": 1,
    "matmul": 1,
    "optim": 1,
    "config": 2,
    "models": 3,
    "adapters": 3,
    "data": 3,
    "training": 4,
    "commands": 5,
    "cli": 6,
    "__main__": 7,
}
WITHOUT_TORCH = ("errors", "families", "config", "cli")
"""Rooms that import none of the heavy libraries, not even in a function."""
FULL = 12
"""A folder with more files than this, beside its `__init__.py`, needs chapters."""
SDTRAIN = sorted((ROOT / "sdtrain").rglob("*.py"))
OPTIM = sorted((ROOT / "optim").rglob("*.py"))
FOLDERS = sorted({path.parent for path in (*SDTRAIN, *OPTIM)})


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """`data` for sdtrain.data.batches, `optim` for optim.formulas.rounding; empty for what is not ours."""
    parts = module.split(".")
    if parts[0] == "sdtrain":
        return parts[1] if len(parts) > 1 else ""
    return parts[0] if parts[0] == "optim" else ""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; of a package also the names taken out of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are written in full"
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names if room(node.module) or not node.level)


@pytest.mark.parametrize("path", [*SDTRAIN, *OPTIM], ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    own = room(module_of(path))
    for module in imports(path):
        other = room(module)
        if not own or not other or other == own or other not in LAYERS:
            continue
        assert LAYERS[other] < LAYERS[own], f"{path.relative_to(ROOT)} ({own}) imports {module}"
        assert other != "optim" or LAYERS[own] >= LAYERS["training"], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_answers_at_once_imports_nothing_heavy(name: str) -> None:
    heavy = {"torch", "diffusers", "transformers", "peft"}
    paths = [path for path in SDTRAIN if room(module_of(path)) == name]
    assert paths
    for path in paths:
        assert not heavy & {module.split(".")[0] for module in imports(path)}, path


def test_optim_imports_torch_and_nothing_of_ours() -> None:
    for path in OPTIM:
        assert not [module for module in imports(path) if module.split(".")[0] == "sdtrain"], path


@pytest.mark.parametrize("paths", [SDTRAIN, OPTIM], ids=["sdtrain", "optim"])
def test_no_file_imports_itself_by_way_of_others(paths: list[Path]) -> None:
    """Also not for its types only: a file that needs another's class to describe itself is a part of it."""
    known = {module_of(path) for path in paths if path.name != "__init__.py"}
    uses = {module_of(path): known.intersection(imports(path)) for path in paths}
    for start in sorted(known):
        reached, waiting = set[str](), set(uses[start])
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting |= uses[name] - reached
        assert start not in reached, f"{start} imports itself by way of {sorted(reached)}"


def test_there_are_no_rooms_without_a_layer() -> None:
    rooms = {path.stem for path in (ROOT / "sdtrain").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__init__", "__pycache__", "builtin", "py"} == set(LAYERS) - {"optim"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_no_folder_is_too_full_to_read(folder: Path) -> None:
    files = [path.name for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert len(files) <= FULL, f"{len(files)} files without chapters: {', '.join(sorted(files))}"


def test_every_room_and_chapter_says_what_it_is() -> None:
    for folder in FOLDERS:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder
