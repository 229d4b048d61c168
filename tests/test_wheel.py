"""The wheel holds all that is needed: in an empty environment, without a clone, it trains the quickstart."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "configs", "optim", "sdtrain")
LEFT_OUT = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}


def run(command: Sequence[str | Path], folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of links to the sources, so that nothing is written beside them."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy_into(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", dist, "."], source)
    (found,) = dist.glob("sdtrain-*-py3-none-any.whl")
    return found


def copy_into(source: Path, target: Path) -> None:
    """Link files and copy links: setuptools walks real folders only."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        for inner in source.iterdir():
            if inner.name != "__pycache__":
                copy_into(inner, target / inner.name)
    elif source.is_symlink():
        target.symlink_to(source.readlink())
    else:
        target.symlink_to(source)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel alone; the packages it needs are those of this one, seen behind it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    found = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", found]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], folder)
    packages = run([found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    behind = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(packages) / "behind.pth").write_text("\n".join(sorted(behind)), encoding="utf-8")
    return found


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {
        path.relative_to(ROOT).as_posix()
        for package in ("optim", "sdtrain")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there |= {f"sdtrain/builtin/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert held == there


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel_without_a_clone(python: Path, tmp_path: Path) -> None:
    where = run([python, "-c", "import sdtrain, optim; print(sdtrain.__file__, optim.__file__)"], tmp_path).split()
    assert all(Path(file).is_relative_to(python.parent.parent) for file in where), "that of the wheel, not of the clone"
    few = ["--set", "steps=2", "--set", "preview.every=0", "--set", "checkpoint.every=0"]
    run([python.with_name("sdtrain"), "fit", "builtin:quickstart", *few], tmp_path)
    folder = tmp_path / "runs" / "quickstart"
    assert (folder / "weights" / "quickstart.safetensors").is_file()
    assert (folder / "report.html").is_file()
