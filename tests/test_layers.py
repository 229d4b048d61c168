"""Imports go down only, siblings never import one another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "errors": 0,
    "config": 1,
    "diffusion": 1,
    "optim": 1,
    "models": 2,
    "adapters": 2,
    "data": 2,
    "training": 3,
    "cli": 4,
}
OPTIM = sorted((ROOT / "optim").glob("*.py"))
SOURCES = sorted([*(ROOT / "sdtrain").rglob("*.py"), *OPTIM])


def room(module: str) -> str:
    """`data` for sdtrain.data.batches, `optim` for optim.rounding."""
    parts = module.split(".")
    if parts[0] == "sdtrain":
        return parts[1] if len(parts) > 1 else ""
    return parts[0] if parts[0] == "optim" else ""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are written in full"
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names if node.module in ("sdtrain", "optim"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        other = room(module)
        if not own or not other or other == own or other.startswith("__"):
            continue
        assert LAYERS[other] < LAYERS[own], f"{path.relative_to(ROOT)} ({own}) imports {module}"
        assert other != "optim" or own == "training", f"{path.relative_to(ROOT)}: only training uses optim"


def test_optim_imports_torch_and_nothing_of_ours() -> None:
    for path in OPTIM:
        assert not [module for module in imports(path) if module.split(".")[0] == "sdtrain"], path


def test_no_file_of_optim_imports_itself_by_way_of_others() -> None:
    """Also not for its types only: a file that needs another's class to describe itself is a part of it."""
    uses = {path.stem: {m.split(".")[1] for m in imports(path) if m.startswith("optim.")} for path in OPTIM}
    for start in uses:
        reached, waiting = set[str](), set(uses[start])
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting |= uses.get(name, set()) - reached
        assert start not in reached, f"optim/{start}.py imports itself by way of {sorted(reached)}"


def test_there_are_no_rooms_without_a_layer() -> None:
    rooms = {path.stem for path in (ROOT / "sdtrain").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__init__", "__pycache__", "builtin", "py"} <= set(LAYERS)
