"""Nothing in sdtrain writes a file past `sdtrain.files`, where the contract of writing is kept."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SDTRAIN = Path(__file__).parent.parent.parent / "sdtrain"
ELSEWHERE = [path for path in sorted(SDTRAIN.rglob("*.py")) if path.parent != SDTRAIN / "files"]
ALLOWED = {
    ("training/watching/log.py", "open"): "a line is added to the log after each step; a torn last one is dropped",
    ("training/watching/report/pictures.py", "save"): "into memory, for the page that holds it",
    ("commands/sheet/page.py", "save"): "into memory, for the page that holds it",
    ("training/describing/author.py", "save"): "into memory, for the header that holds it",
    (
        "commands/sheet/write.py",
        "open",
    ): "writes into a folder that atomic_folder flushes",
    ("training/planning/trace.py", "save"): "a phase of the plan, which writes nothing",
    ("models/checkpoints/tokenizers.py", "save_pretrained"): "writes into a folder that atomic_folder flushes",
}
WRITERS = {"write_text", "write_bytes", "save_file", "save_pretrained", "save_model", "writelines", "touch"}
COPIERS = {"shutil": {"copy", "copy2", "copyfile", "copytree", "move"}, "os": {"replace", "rename", "renames", "link"}}
WRITING = re.compile(r"[rwaxbtU+]*[wax+][rwaxbtU+]*")
"""A mode of `open` that lets a file be changed."""


def writes(tree: ast.Module) -> Iterator[str]:
    """What in a file writes, moves or copies files, other than through `sdtrain.files`."""
    ours = {
        item.optional_vars.id
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.optional_vars, ast.Name)
        and isinstance(item.context_expr, ast.Call)
        and ast.unparse(item.context_expr.func) == "atomic_file"
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        is_method = bool(owner)
        if (
            (name == "open" and any(WRITING.fullmatch(mode) for mode in texts(node)))
            or name in WRITERS - {"write_text", "write_bytes"}
            or (is_method and name in WRITERS)
            or (owner in COPIERS and name in COPIERS[owner])
            or (is_method and (name == "rename" or (name == "replace" and len(node.args) == 1 and not node.keywords)))
            or (is_method and name in ("save", "dump") and not {ast.unparse(value) for value in node.args[:1]} & ours)
        ):
            yield name


def texts(call: ast.Call) -> list[str]:
    """The arguments of a call that are written out as text."""
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: str(path.relative_to(SDTRAIN)))
def test_no_other_code_opens_a_file_for_writing(path: Path) -> None:
    name = path.relative_to(SDTRAIN).as_posix()
    found = [what for what in writes(ast.parse(path.read_text(encoding="utf-8"))) if (name, what) not in ALLOWED]
    assert not found, f"{name} calls {', '.join(found)}; use sdtrain.files.writer, which says why"


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'w')",
        "path.open('ab')",
        "path.open(mode='r+')",
        "path.write_text('x')",
        "save_file(tensors, path)",
        "safetensors.torch.save_file(tensors, path)",
        "picture.save(path)",
        "torch.save(state, path)",
        "json.dump(table, file)",
        "shutil.copyfile(a, b)",
        "os.replace(a, b)",
        "partial.replace(path)",
        "partial.rename(path)",
    ],
)
def test_the_law_sees_every_way_of_writing(code: str) -> None:
    assert list(writes(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "path.open('rb')",
        "'a'.replace('b', 'c')",
        "replace(config, name='x')",
        "write_text(path, 'x')",
        "with atomic_file(path) as file:\n    picture.save(file, format='PNG')",
    ],
)
def test_the_law_lets_readers_be(code: str) -> None:
    assert not list(writes(ast.parse(code)))
