"""The recipes are found wherever sdtrain is installed, and a copy is one's own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from sdtrain.config.read import read_config
from sdtrain.config.text.recipes import FOLDER, recipes
from tests.commands.starting.conftest import ran

ROOT = Path(__file__).parents[3]


def test_the_folder_of_the_repository_is_that_of_the_package() -> None:
    assert (ROOT / "configs").resolve() == FOLDER.resolve()
    assert {path.stem for path in (ROOT / "configs").glob("*.toml")} == set(recipes())


def test_every_recipe_is_listed_with_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    rows = ran("configs", "list").splitlines()
    for name in recipes():
        assert any(re.match(rf"{name}\s+\w+ .*\.\s*$", row) for row in rows), name


@pytest.mark.parametrize("name", recipes())
def test_a_copy_means_the_same_and_is_never_written_over_what_is_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = ran("configs", "copy", name, "my own.toml")
    assert said.splitlines()[-1].endswith("sdtrain check 'my own.toml'")
    assert read_config(Path("my own.toml")) == read_config(Path(f"builtin:{name}"))
    text = Path("my own.toml").read_text(encoding="utf-8")
    assert "schema.json" not in text and f"configs/{name}" not in text
    assert "is there already" in ran("configs", "copy", name, "my own.toml", code=2)
    ran("configs", "copy", name.replace("_", "-"), ".")
    ran("configs", "copy", name, "--force")
    assert Path(f"{name}.toml").exists()


def test_a_recipe_that_is_not_there_is_told_with_those_that_are() -> None:
    for arguments in (["configs", "copy", "none"], ["check", "builtin:none"], ["fit", "builtin:none"]):
        told = ran(*arguments, code=2)
        assert "there are quickstart, " in told


def test_what_is_wrong_with_a_recipe_is_told_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ran("check", "builtin:tiny_sdxl", code=2)
    assert "builtin:tiny_sdxl:11: model.path" in told


def test_the_package_brings_the_recipes_along() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["sdtrain"]
    for path in FOLDER.iterdir():
        place = path.relative_to(ROOT / "sdtrain").as_posix()
        assert any(fnmatch(place, pattern.replace("**/*", "*")) for pattern in patterns), place


@pytest.mark.slow  # the wheel's own test does it with what is installed
def test_the_quickstart_runs_where_only_the_package_is(tmp_path: Path) -> None:
    """Away from the repository: nothing but the two packages is there."""
    for package in ("sdtrain", "optim"):
        shutil.copytree(ROOT / package, tmp_path / "site" / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "work").mkdir()
    few = ["steps=1", "preview.every=0", "data.resolution_px=64", "method.rank=1", "device=cpu"]
    overrides = [word for setting in few for word in ("--set", setting)]
    command = [sys.executable, "-m", "sdtrain", "fit", "builtin:quickstart", *overrides]
    done = subprocess.run(
        command,
        cwd=tmp_path / "work",
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(tmp_path / "site"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "runs" / "quickstart" / "weights" / "quickstart.safetensors").exists()
