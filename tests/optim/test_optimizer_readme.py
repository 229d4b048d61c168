"""The README of the optimizer shows the settings as they are."""

import dataclasses
import inspect
import re
from pathlib import Path

import optim
from optim.settings import Settings


def table_of_settings() -> str:
    """The settings, their defaults and what the docstring says of them, for the README."""
    text = inspect.getdoc(Settings).split("Args:\n")[1].split("\n\nRaises:")[0]  # type: ignore[union-attr]
    meanings = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE)
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, meaning in meanings:
        shown = str(defaults[name]) if not isinstance(defaults[name], str) else f'"{defaults[name]}"'
        lines.append(f"| `{name}` | {shown} | {' '.join(meaning.split()).removesuffix('.')} |")
    return "\n".join(lines)


def test_the_readme_shows_every_setting_with_its_default_and_meaning() -> None:
    readme = (Path(optim.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert table_of_settings() in readme, f"put this into optim/README.md:\n{table_of_settings()}"
