"""The notebook in scripts/ is plain, names what exists, and its cells run one after the other."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from sdtrain.cli import app

NOTEBOOK = Path(__file__).parent.parent / "scripts" / "first_lora.ipynb"
BOOK: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in BOOK["cells"] if cell["cell_type"] == "code"]


def as_python(cell: str) -> str:
    """Return a cell as plain Python: `!` lines are run as commands, `%pip` installs nothing."""
    cell = re.sub(r"^( *)%pip .*$", r"\1pass", cell, flags=re.M)
    return re.sub(r"^( *)!(.*)$", lambda line: f"{line[1]}shell(f{line[2]!r})", cell, flags=re.M)


def options_of(cell: str) -> str:
    """Return the options that a cell keeps in a variable for its command."""
    found = re.search(r'^WHAT = f"(.*)"$', cell, flags=re.M)
    return found[1] if found else ""


def test_it_is_a_notebook_without_outputs() -> None:
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    assert BOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])
    for cell in BOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_python_with_commands_that_exist(cell: str) -> None:
    compile(as_python(cell), "cell", "exec")
    assert not re.search(r"^\s*%(?!pip )", cell, flags=re.M), "no other magics: they need IPython"
    for line in re.findall(r"^\s*!(.*)$", cell.replace("{WHAT}", options_of(cell)), flags=re.M):
        program, command = shlex.split(line)[:2]
        found = get_command(app).commands[command]  # type: ignore[attr-defined]
        known = {option for parameter in found.params for option in parameter.opts}
        assert program == "sdtrain"
        assert set(re.findall(r"--[a-z-]+", line)) <= known


@pytest.mark.slow
def test_the_cells_run_as_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown: list[str] = []
    codes: dict[str, int] = {}

    def shell(line: str) -> None:
        program, *arguments = shlex.split(line)
        assert program == "sdtrain"
        done = subprocess.run(
            [sys.executable, "-m", "sdtrain", *arguments], check=False, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr
        codes[arguments[0]] = done.returncode

    display = ModuleType("IPython.display")
    vars(display).update(Image=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    space: dict[str, Any] = {"shell": shell}
    for cell in CELLS:
        short = re.sub(r"^STEPS = \d+$", "STEPS = 4", cell, flags=re.M)
        exec(compile(as_python(short), "cell", "exec"), space)
    assert codes.pop("doctor") in (0, 1), "1: there is no GPU"
    assert codes == dict.fromkeys(("init", "check", "fit", "sample", "info"), 0)
    assert len(shown) == 2 and all(Path(path).is_file() for path in shown)
    assert (tmp_path / "runs" / "first" / "weights" / "first.safetensors").is_file()
