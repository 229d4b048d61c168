"""What the rules for contributors say of the repository is so."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGES = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", TEXT, flags=re.M | re.S)


def layers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "tests" / "test_layers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed_folders() -> list[str]:
    """The folders of the tree listing, as paths; two spaces of indentation a level."""
    above: list[str] = []
    found = []
    for indent, name in re.findall(r"^( *)([\w-]+)/(?:\s|$)", BLOCKS[0], flags=re.M):
        above = [*above[: len(indent) // 2], name]
        found.append("/".join(above))
    return found


def existing_folders() -> set[str]:
    """The folders of the packages that hold sources."""
    files = [path for package in ("optim", "sdtrain") for path in (ROOT / package).rglob("*.py")]
    return {path.parent.relative_to(ROOT).as_posix() for path in files}


def test_the_tree_of_the_rules_is_the_tree() -> None:
    listed = listed_folders()
    assert len(listed) == len(set(listed))
    assert set(listed) - existing_folders() == {"sdtrain/builtin", "configs", "scripts", "tests"}
    assert existing_folders() <= set(listed)
    assert all((ROOT / folder).is_dir() for folder in listed)


def test_the_layers_of_the_rules_are_those_that_are_held() -> None:
    held = layers()
    said: dict[str, int] = {}
    for number, names in re.findall(r"^(\d) +(.*)$", BLOCKS[1], flags=re.M):
        for cell in names.split("|"):
            said[cell.split()[0]] = int(number)
    assert said == {name: layer for name, layer in held.LAYERS.items() if not name.startswith("__")}
    assert f"at most {held.FULL} files" in TEXT
    assert {"errors", "families", "config", "cli"} == set(held.WITHOUT_TORCH) - {"__main__"}


def test_every_file_the_rules_name_exists() -> None:
    named = set(re.findall(r"`((?:scripts|configs|tests|sdtrain|optim|\.github)/[\w./-]+)`", TEXT))
    assert len(named) > 10
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("text", [TEXT, CHANGES], ids=["rules", "changelog"])
def test_the_lower_bounds_are_told_as_they_are(text: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {"torch": "PyTorch"}
    for bound in project["dependencies"]:
        name, version = bound.split(">=")
        said = re.search(rf"\b{names.get(name, name)} (\d[\d.]*\d|\d+)", text)
        if text is TEXT or said:
            assert said and said[1] == version, bound


def test_the_newest_version_of_the_changelog_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = re.findall(r"^## (\S+)", CHANGES, flags=re.M)
    assert versions[:2] == ["Unreleased", project["version"]]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_forms_for_issues_are_complete(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    for part in form["body"]:
        assert part["id"] and part["attributes"]["label"]
    if name == "bug":
        assert {"version", "config", "log"} <= {part["id"] for part in form["body"]}


def test_hooks_fetch_nothing_and_check_what_the_tests_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    entries = [hook["entry"] for hook in hooks["repos"][0]["hooks"]]
    assert {"ruff check", "ruff format --check", "mypy"} <= {entry.partition(" -m ")[2] for entry in entries}
