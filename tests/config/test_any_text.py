"""Whatever stands in a config or after `--set`, the answer is a config or sentences, never a traceback."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdtrain.config.draft import draft_of
from sdtrain.config.from_python import make_config
from sdtrain.config.mistakes import all_settings
from sdtrain.config.paths import DEEPEST, toml_string
from sdtrain.config.read import overridden, read_config, read_draft
from sdtrain.config.write import config_to_toml
from sdtrain.errors import UserError, printable
from sdtrain.training.start import inspect_run

GOOD = """name = "x"
steps = 4
[model]
path = "builtin:tiny-sdxl"
[method]
kind = "lora"
[data]
resolution_px = 64
[[data.folder]]
path = "builtin:quickstart"
"""
TABLE: dict[str, Any] = {
    "name": "x",
    "steps": 4,
    "model": {"path": "builtin:tiny-sdxl"},
    "method": {"kind": "lora"},
    "data": {"resolution_px": 64, "folder": [{"path": "builtin:quickstart"}]},
}
LONG = "9" * 5000
VALUES = st.sampled_from(
    [
        *(LONG, "-" + LONG, "0x" + "f" * 5000, "1e999", "-1e999", "nan", "1" + "0" * 400, "9223372036854775807"),
        *("[" * 500 + "]" * 500, "{a = " * 500 + "1" + "}" * 500, "[" * 9000, "[]", "{}", "true", "1979-05-27", "-1"),
        *('""', '"~nobody-of-that-name/x"', '"\\u0000"', f'"{"a" * 300}"', f'"{"a/" * 5000}"', '"/dev/null"', "0", "1"),
        *("[1, 2]", '["a"]', '[{path = "x"}]', '{"a.b" = {c = [1]}}', '"\\u001b[2J"', '"[/bold]"', "16384", "100.5"),
    ]
) | st.text(max_size=20).map(toml_string)
KEYS = st.sampled_from([*all_settings(), "data.folder", "validation.folder", "method", "data", "optimizer", "nothing"])


def answer(text: str, overrides: list[str]) -> str:
    """The problems of a config text, empty when there are none; the whole of what `check` does but for decoding."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            draft = read_draft(path, overrides)
            inspect_run(draft, decode=False)
            config_to_toml(draft.require_sound())
        except UserError as error:
            assert error.text() == "\n".join(map(printable, error.text().split("\n")))
            return error.text()
        return ""


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3))
def test_whatever_is_set_the_answer_is_a_config_or_sentences(pairs: list[tuple[str, str]]) -> None:
    answer(GOOD, [f"{key}={value}" for key, value in pairs])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.text(max_size=6)), min_size=1, max_size=4))
@example([(0, "\ud800")])
@example([(0, "a = " + "[" * 5000)])
@example([(0, f"seed = {LONG}\n")])
def test_whatever_is_changed_in_a_config_the_answer_is_a_config_or_sentences(changes: list[tuple[int, str]]) -> None:
    text = GOOD
    for place, new in changes:
        text = text[:place] + new + text[place + len(new) // 2 :]
    answer(text, [])


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**400, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*TABLE, "optimizer", "validation", "preview"]), PLAIN, min_size=1, max_size=3))
@example({"steps": 10**5000})
@example({"optimizer": {"d0": 10**400}})
def test_whatever_is_given_in_python_the_answer_is_a_config_or_sentences(changes: dict[str, Any]) -> None:
    try:
        make_config(TABLE | changes)
    except UserError as error:
        error.text()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("name=" + "a" * 300, "at most 100 characters"),
        ("name=../../evil", "should match pattern"),
        ("name=/tmp/evil", "should match pattern"),
        (f"steps={LONG}", "a whole number"),
        ("steps=1" + "0" * 18, "less than or equal to 1000000000"),
        ("model.path=" + "a" * 300, "at most 255 bytes each"),
        ('output="a\\u0000b"', "without zero bytes"),
        ("output=~nobody-of-that-name/x", "no user of that name"),
        ("seed=99999999999999999999", "a whole number"),
        ("data.resolution_px=1000000000", "less than or equal to 16384"),
        ("steps=" + "[" * 400 + "]" * 400, "a whole number"),
    ],
)
def test_absurd_values_are_refused_in_a_sentence(override: str, sentence: str) -> None:
    assert sentence in answer(GOOD, [override])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a = " + "[" * 5000, f"more than {DEEPEST} deep"),
        ("a = " + "[" * 40 + "]" * 40, f"more than {DEEPEST} deep"),
        (f"seed = {LONG}", "does not fit 64 bits"),
        ("seed = 0x" + "f" * 5000, "does not fit 64 bits"),
        ("seed = 9223372036854775808", "does not fit 64 bits"),
        ('name = "\ud800"', "not text in UTF-8"),
    ],
)
def test_absurd_toml_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    told = answer(text, [])
    assert sentence in told and "1 problem" in told


def test_a_config_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / ("a" * 300), tmp_path / "file" / "config.toml"):
        with pytest.raises(UserError, match="cannot be read: "):
            read_config(path)


def test_the_largest_numbers_that_are_settings_are_taken() -> None:
    table = TABLE | {"steps": 1_000_000_000, "seed": 2**63 - 1, "name": "a" * 100}
    assert draft_of(overridden(table, "x", [])).require_sound().steps == 1_000_000_000
