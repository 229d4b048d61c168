"""The Dockerfile copies what is there, and says the commands that the README says. Nothing is built here."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

from typer.main import get_command

from sdtrain.cli import app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "scripts" / "Dockerfile").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
KNOWN = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The instructions in their order, each with the rest of its line; continued lines are one."""
    lines = [line for line in TEXT.replace("\\\n", " ").split("\n") if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def copied() -> list[str]:
    """What is copied of the clone."""
    plain = [shlex.split(rest)[:-1] for word, rest in instructions() if word == "COPY" and "--from=" not in rest]
    return [path for paths in plain for path in paths]


def sent(path: str) -> bool:
    """Whether docker is sent a path, by the rules beside the Dockerfile: the last that fits counts."""
    found = True
    for rule in (ROOT / "scripts" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines():
        if rule and not rule.startswith("#") and fnmatch.fnmatch(path, rule.removeprefix("!").removeprefix("**/")):
            found = rule.startswith("!")
    return found


def test_what_it_copies_is_there_and_is_sent() -> None:
    assert {word for word, _ in instructions()} <= KNOWN
    assert copied()
    for path in copied():
        assert (ROOT / path).exists() and sent(path), path
    assert not sent(".venv") and not sent("runs") and not sent("__pycache__")


def test_all_that_the_wheel_is_made_of_is_copied() -> None:
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    links = {path.resolve().relative_to(ROOT).parts[0] for path in (ROOT / "sdtrain" / "builtin").iterdir()}
    assert packages | files | links - {"sdtrain"} | {"constraints.txt"} == set(copied())


def test_it_starts_the_command_of_the_project() -> None:
    (entry,) = [rest for word, rest in instructions() if word == "ENTRYPOINT"]
    assert [entry.strip('[]"')] == list(PROJECT["project"]["scripts"])
    bases = [rest for word, rest in instructions() if word == "FROM"]
    assert all("${BASE}" in base for base in bases), "the base is chosen when it is built"


def test_its_commands_are_those_of_the_readme() -> None:
    said = [line.strip() for line in re.findall(r"^#   (docker .*)$", TEXT, flags=re.M)]
    assert len(said) == 4
    assert [line for line in README.splitlines() if line.startswith("docker ")] == said
    for line in said:
        words = shlex.split(line)
        if words[1] == "build":
            assert words[words.index("-f") + 1] == "scripts/Dockerfile" and words[-1] == "."
            arguments = {name.partition("=")[0] for name in words if "=" in name}
            assert arguments <= {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}
        else:
            assert words[words.index("sdtrain") + 1] in get_command(app).commands  # type: ignore[attr-defined]
