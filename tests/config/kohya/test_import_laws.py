"""Whatever stands in a file of kohya: no traceback, a config that our own reader accepts, every option answered."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdtrain.config.kohya.importing.convert import convert
from sdtrain.config.kohya.importing.options import foreign_config, read_file
from sdtrain.config.kohya.known import EMBEDDINGS, KNOWN, NETWORK_ARGS, OPTIMIZER_ARGS, OTHER_MODELS
from sdtrain.config.read import resolve
from sdtrain.errors import UserError

NAMES = sorted(set(KNOWN) - {*OTHER_MODELS, *EMBEDDINGS})
WORDS = (
    *("", "None", "0", "1", "-1", "0.5", "1e-4", "True", "false", "1024,1024", "512", "64", "bf16", "fp16", "no"),
    *("huber", "smooth_l1", "networks.lora", "lycoris.kohya", "LyCORIS/LoHa", "LyCORIS/Diag-OFT", "Standard", "full"),
    *("Prodigy", "prodigyplus.ProdigyPlusScheduleFree", "a cat --w 768 --n bad --s x", ".caption", "pictures", "sd_xl"),
    *("conv_dim=8 conv_alpha=x", "weight_decay=0.1 betas=0.9,0.99 d_coef=-1", "Original", "--lr=1 'open", "\0", "\n#"),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 2000)
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=12)
)
arguments = st.builds(
    lambda name, value: f"{name}={value}",
    st.sampled_from([*NETWORK_ARGS, *OPTIMIZER_ARGS, *NAMES[::9], "prodigy_steps", "split_groups", "eps", "betas"]),
    st.sampled_from(WORDS) | st.integers() | st.text(max_size=5),
)
values = scalars | st.lists(scalars | arguments, max_size=3) | st.dictionaries(st.text(max_size=5), scalars, max_size=2)
options = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), values, max_size=12)
subsets = options.map(lambda table: {"image_dir": "pictures", **table})
datasets = st.builds(lambda table, inner: {**table, "subsets": inner}, options, st.lists(subsets, max_size=2))
tables = st.builds(
    lambda flat, section, arranged: (
        {**flat, "general": section, "datasets": arranged} if arranged else flat | {"s": section}
    ),
    options,
    options,
    st.lists(datasets, max_size=2),
)
"""Configs of trainings, with sections, and of datasets; the values are likely ones and unlikely ones."""


def leaves(table: Any) -> Iterator[str]:
    """The names of all options in a table, found without the code that is tested."""
    if isinstance(table, dict):
        for key, value in table.items():
            if not isinstance(value, dict) or not value:
                yield key
            yield from leaves(value)
    elif isinstance(table, list) and any(
        (isinstance(entry, dict) and "image_dir" in entry) or "subsets" in entry
        for entry in table
        if isinstance(entry, dict)
    ):
        for entry in table:
            yield from leaves(entry)


def comments(text: str) -> str:
    """All comments in a line, without the breaks between words."""
    return " ".join(" ".join(line.partition("#")[2] for line in text.splitlines()).split())


BAD_FOLDER = {
    "datasets": [{"subsets": [{"image_dir": "a"}, {"image_dir": "\x00", "num_repeats": 3}, {"image_dir": "b"}]}]
}


@example(BAD_FOLDER, None)
@given(tables, st.none() | st.integers(1, 500))
@settings(max_examples=150, deadline=None)
def test_any_options_become_a_config_with_an_answer_to_each(table: dict[str, Any], pictures: int | None) -> None:
    foreign = foreign_config([("their file.json", table)])
    try:
        imported = convert(foreign, lambda path: pictures)
    except UserError as error:  # what is for models that are not trained here
        assert all(" for another sort of model" in problem.what for problem in error.problems)
        return
    resolve(tomllib.loads(imported.text), "imported")
    said = comments(imported.text)
    assert len(imported.outcomes) == len(foreign.everything)
    for name in leaves(table):
        if name in KNOWN:
            assert name in said, name
    for outcome in imported.outcomes:
        assert outcome.sort != "unknown" or outcome.option.name not in KNOWN


@given(st.sampled_from(NAMES), scalars)
@settings(max_examples=150, deadline=None)
def test_a_known_option_alone_never_stays_unknown(name: str, value: Any) -> None:
    try:
        imported = convert(foreign_config([("x.toml", {name: value})]), lambda path: None)
    except UserError:
        return
    assert all(one.sort != "unknown" for one in imported.outcomes if one.option.name == name)
    resolve(tomllib.loads(imported.text), "imported")


@given(tables)
@settings(max_examples=60, deadline=None)
def test_the_same_files_give_the_same_text(table: dict[str, Any]) -> None:
    try:
        texts = {convert(foreign_config([("x", table)]), lambda path: None).text for _ in range(2)}
    except UserError:
        return
    assert len(texts) == 1


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
@settings(max_examples=100, deadline=None)
def test_any_file_is_read_or_refused_with_a_sentence(tmp_path_factory: Any, content: bytes) -> None:
    path: Path = tmp_path_factory.mktemp("any") / "config.json"
    for name in ("config.json", "config.toml"):
        path = path.with_name(name)
        path.write_bytes(content)
        try:
            assert isinstance(read_file(path), dict)
        except UserError as error:
            assert error.problems[0].where in ("file", "syntax")


def test_json_that_is_no_table_or_too_deep_is_refused(tmp_path: Path) -> None:
    for content in ("[1, 2]", "[" * 100_000, json.dumps("text")):
        (tmp_path / "x.json").write_text(content, encoding="utf-8")
        try:
            read_file(tmp_path / "x.json")
        except UserError:
            continue
        raise AssertionError(content[:20])
