"""Where a setting stands in a TOML text: the line that is told holds it, whatever stands around it."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.config.paths import Location
from sdtrain.config.read import read_draft
from sdtrain.config.text.lines import lines_of, nearest_line
from sdtrain.errors import UserError
from sdtrain.training.start import stored_config

DECOYS = ("[x]", "k1 = 1", "[[k2]]", '"', "'", "\\\\", "]", "}", ",", "#", "k3.k4 = [")
"""What is no key where it stands: in strings and comments."""


class Written:
    """A document that is written piece by piece, with the line of each key as it was when the key was written."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.text, self.lines, self.keys = draw, "", dict[Location, int](), 0

    def here(self) -> int:
        return self.text.count("\n") + 1

    def key(self, above: Location, location: Location) -> None:
        """Write the keys from a section to a location, with dots."""
        for end in range(len(above) + 1, len(location) + 1):
            name = str(location[end - 1])
            self.lines.setdefault(location[:end], self.here())
            quote = self.draw(st.sampled_from(["", '"', "'"])) if " " not in name else self.draw(st.sampled_from("\"'"))
            self.text += f"{quote}{name}{quote}" + self.draw(st.sampled_from(["", " "]))
            self.text += "." if end < len(location) else ""

    def new(self, above: Location) -> Location:
        self.keys += 1
        name = f"k{self.keys}" + self.draw(st.sampled_from(["", " ]", " # =", "-"]))
        return (*above, name)

    def value(self, location: Location, depth: int) -> None:
        kinds = ["scalar", "basic", "literal", "lines", "literal lines", "list", "table"]
        kind = self.draw(st.sampled_from(kinds if depth < 3 else kinds[:5]))
        decoys = self.draw(st.lists(st.sampled_from(DECOYS), max_size=3))
        match kind:
            case "scalar":
                self.text += self.draw(st.sampled_from(["1", "-2.5e3", "true", "1979-05-27 07:32:00", "0x1f", "inf"]))
            case "basic":
                self.text += '"' + "".join(decoys).replace("\\", "\\\\").replace('"', '\\"') + '"'
            case "literal":
                self.text += "'" + "".join(decoys).replace("'", "") + "'"
            case "lines":
                inner = "\n".join(decoys).replace("\\", "\\\\")
                self.text += '"""' + inner + self.draw(st.sampled_from(["", "\\\n ", "\n", "\\\\"])) + ' """'
                self.text += self.draw(st.sampled_from(["", '"', '""']))
            case "literal lines":
                self.text += "'''\n" + "\n".join(decoys) + " '''" + self.draw(st.sampled_from(["", "'", "''"]))
            case "list":
                self.list(location, depth)
            case _:
                self.table(location, depth)

    def gap(self) -> None:
        decoy = self.draw(st.sampled_from(DECOYS))
        self.text += self.draw(st.sampled_from(["", " ", "\n", f" # {decoy}\n", "\n\n"]))

    def list(self, location: Location, depth: int) -> None:
        self.text += "["
        for index in range(num := self.draw(st.integers(0, 3))):
            self.gap()
            self.lines[*location, index] = self.here()
            self.value((*location, index), depth + 1)
            self.gap()
            self.text += "," if index < num - 1 or self.draw(st.booleans()) else ""
        self.gap()
        self.text += "]"

    def table(self, location: Location, depth: int) -> None:
        self.text += "{ "
        for index in range(self.draw(st.integers(0, 2))):
            self.text += ", " if index else ""
            self.pair(location, depth + 1)
        self.text += " }"

    def pair(self, above: Location, depth: int = 0) -> None:
        location = self.new(above)
        location = self.new(location) if self.draw(st.booleans()) else location
        self.key(above, location)
        self.text += self.draw(st.sampled_from(["=", " = "]))
        self.value(location, depth)

    def body(self, above: Location) -> None:
        for _ in range(self.draw(st.integers(0, 3))):
            self.pair(above)
            self.text += self.draw(st.sampled_from(["\n", " # k9 = [\n", "\r\n", "\n\n"]))

    def section(self, above: Location) -> Location:
        """Write a section in another one, or a list of sections; return where it is."""
        names = tuple(part for part in above if isinstance(part, str))
        is_list = self.draw(st.booleans())
        location = self.new(above)
        self.text += "[[" if is_list else "["
        before = dict(self.lines)
        self.key((), (*names, location[-1]))
        self.lines = before  # the names above were known before, and their indices are not in the keys
        self.lines[location] = self.here()
        self.text += "]]\n" if is_list else "] # [k1]\n"
        if is_list:
            location = (*location, 0)
            self.lines[location] = self.here() - 1
        self.body(location)
        return location


@st.composite
def documents(draw: st.DrawFn) -> Written:
    written = Written(draw)
    written.body(())
    sections: list[Location] = [()]
    for _ in range(draw(st.integers(0, 3))):
        sections.append(written.section(draw(st.sampled_from(sections))))
    return written


def every(value: Any, above: Location = ()) -> Iterator[Location]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, inner in pairs:
        yield (*above, part)
        yield from every(inner, (*above, part))


@settings(max_examples=150)
@given(documents())
def test_the_line_that_is_told_holds_the_key(written: Written) -> None:
    table = tomllib.loads(written.text)
    found = lines_of(written.text)
    assert set(found) == set(every(table))
    rows = written.text.split("\n")
    for location, line in found.items():
        assert line == written.lines[location], (location, written.text)
        name = next(part for part in reversed(location) if isinstance(part, str))
        assert isinstance(location[-1], int) or name in rows[line - 1]


PIECES = [*"ab.=\"'[]{}#,\n\\1", "[[", "]]", " = ", "\n", '"""', "'''", "a = 1\n", "[a]\n", "[[b]]\n", "\r\n"]
PIECES += ["é", "\x00"]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=12) | st.lists(st.sampled_from(PIECES[14:]), max_size=12))
def test_no_text_makes_the_scanner_fail_and_what_is_not_there_has_no_line(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = lines_of(text)
    with contextlib.suppress(tomllib.TOMLDecodeError):
        table = tomllib.loads(text)
        assert set(found) == set(every(table)), text


def test_lists_of_sections_count_their_entries_and_what_follows_stands_in_the_last() -> None:
    text = "[[a.b]]\nx = 1\n[[a.b]]\n[a.b.c]\nx = 1\n[a]\ny.z = 2\n"
    assert dict(lines_of(text)) == {
        ("a",): 6,
        ("a", "b"): 1,
        ("a", "b", 0): 1,
        ("a", "b", 0, "x"): 2,
        ("a", "b", 1): 3,
        ("a", "b", 1, "c"): 4,
        ("a", "b", 1, "c", "x"): 5,
        ("a", "y"): 7,
        ("a", "y", "z"): 7,
    }


def test_nested_lists_are_not_followed_for_ever() -> None:
    assert lines_of("a = " + "[" * 5000)[("a",)] == 1
    assert nearest_line({("a",): 1}, ("a", "b", 0)) == 1
    assert nearest_line({("a",): 1}, ("b",)) is None


CONFIG = """\
name = "x"
[model]
path = "builtin:tiny-sdxl"
[method]
kind = "lora"
rnak = 4
train = [
  "unet",
  "vae",
]
[data]
batch_size = 0
[[data.folder]]
path = "builtin:quickstart"
[[data.folder]]
repeats = 1
[timesteps]
first = 500
last = 400
"""


def told(path: Path, text: str, *overrides: str) -> tuple[str, dict[str, int | None]]:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_draft(path, overrides).require_sound()
    return caught.value.text(), {problem.where: problem.line for problem in caught.value.problems}


def test_what_is_wrong_is_told_with_its_line_and_overrides_and_what_is_missing_above_all_have_none(
    tmp_path: Path,
) -> None:
    text, lines = told(tmp_path / "my.toml", CONFIG, "preview.every=-1", "data.folder[0].repeats=0")
    assert lines == {
        "method.rnak": 6,
        "method.train[1]": 9,
        "data.batch_size": 12,
        "data.folder[1].path": 15,  # which it lacks
        "timesteps.first": 18,
        "steps": None,
        "--set preview.every=-1": None,
        "--set data.folder[0].repeats=0": None,
    }
    assert "\n  my.toml:12: data.batch_size  " in text
    assert "\n  steps  " in text


def test_a_setting_that_was_changed_on_the_command_line_has_no_line(tmp_path: Path) -> None:
    _, lines = told(tmp_path / "my.toml", CONFIG, "data.batch_size=-1")
    assert lines["--set data.batch_size=-1"] is None
    assert "data.batch_size" not in lines


@pytest.mark.parametrize(
    ("text", "line"), [("a = 1\nb = True\n", 2), ("a = 1\n\nb = [", 3), ("a = 1\na = 2\n", 2), ('a = """\n\n', 3)]
)
def test_what_is_no_toml_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    said, lines = told(tmp_path / "my.toml", text)
    assert lines == {"syntax": line}
    assert f"my.toml:{line}: syntax" in said
    assert "line" not in said.partition("syntax")[2]


def test_programs_are_told_the_line_too(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(CONFIG, encoding="utf-8")
    answer = json.loads(CliRunner().invoke(app, ["check", str(tmp_path / "my.toml"), "--json"]).stdout)
    assert {problem["where"]: problem["line"] for problem in answer["problems"]}["data.batch_size"] == 12


def test_what_is_wrong_in_the_config_of_a_run_is_told_with_its_line_too(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        stored_config(tmp_path, ["preview.every=-1"], prompts=["a cat"])
    assert "\n  config.toml:12: data.batch_size  " in caught.value.text()
