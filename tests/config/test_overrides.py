"""Laws of `--set`: what an error prints can be set, and who made a mistake is named for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.config.draft import draft_of
from sdtrain.config.mistakes import all_settings
from sdtrain.config.overrides import apply_overrides
from sdtrain.config.paths import location_of, path_text, split_path
from sdtrain.config.read import overridden, resolve
from sdtrain.errors import UserError

SMALL: dict[str, Any] = {
    "name": "small",
    "steps": 100,
    "model": {"path": "builtin:tiny-sdxl"},
    "method": {"kind": "lora"},
    "data": {"folder": [{"path": "cats"}, {"path": "dogs"}]},
}
ODD_KEYS = ["rnak", "a b", "a.b", 'a"b', "a'b", "", "é", "[0]", "kind", "path", "*attn2*", "a\nb", "\x7f", "a=b", "\\"]
keys = st.sampled_from(ODD_KEYS) | st.text(max_size=5)
scalars = st.booleans() | st.integers(-2, 2000) | st.floats(allow_nan=False) | st.text(max_size=4)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)


@st.composite
def spoilt(draw: Callable[..., Any]) -> dict[str, Any]:
    """Configs in which a few settings, known and unknown ones, have any value."""
    table = deepcopy(SMALL)
    for setting in draw(st.lists(st.sampled_from(all_settings()), max_size=4)):
        put(table, location_of(setting), draw(values))
    for section in draw(
        st.lists(st.sampled_from(["", "model", "method", "data", "data.folder[1]", "loss"]), max_size=3)
    ):
        put(table, (*(location_of(section) if section else ()), draw(keys)), draw(values))
    return table


def put(table: dict[str, Any], location: tuple[Any, ...], value: Any) -> None:
    inner: Any = table
    for part in location[:-1]:
        if isinstance(inner, dict):
            inner = inner.setdefault(part, {})
        elif isinstance(inner, list) and isinstance(part, int) and part < len(inner):
            inner = inner[part]
        else:
            return
    if isinstance(inner, dict):
        inner[location[-1]] = value


def told(table: dict[str, Any], *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(table, "config.toml", overrides)
    return caught.value


def places(error: UserError) -> dict[str, str]:
    return {problem.where: problem.what for problem in error.problems}


@settings(deadline=None)  # a busy machine is no mistake
@given(table=spoilt())
def test_every_path_that_an_error_prints_can_be_set(table: dict[str, Any]) -> None:
    for problem in draft_of(overridden(table, "config.toml", ())).problems:
        written = overridden(table, "config.toml", [f"{problem.where}=1"])
        assert not written.problems, (problem, written.problems)
        inner: Any = written.table
        for part in location_of(problem.where):
            inner = inner[part]
        assert inner == 1


@settings(deadline=None)
@given(location=st.lists(keys | st.integers(0, 12), min_size=1, max_size=4).map(tuple))
def test_a_printed_path_reads_back_as_the_same_place(location: tuple[str | int, ...]) -> None:
    location = ("data", *location)
    assert split_path(f"{path_text(location)}=1") == (location, "=1")


@settings(deadline=None)
@given(text=st.text(st.sampled_from("a.b[]01='\"\\ \n"), max_size=12) | st.text())
def test_no_text_makes_set_fail_otherwise_than_with_a_problem(text: str) -> None:
    overridden(deepcopy(SMALL), "config.toml", [text])


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("data.folder[0].repeats=3", ("data", "folder", 0, "repeats"), 3),
        ("data.folder[1].path=birds", ("data", "folder", 1, "path"), "birds"),
        ('data.folder[1].path="a b"', ("data", "folder", 1, "path"), "a b"),
        ("data.folder[2].path=birds", ("data", "folder", 2, "path"), "birds"),
        ("data . folder [ 0 ] .repeats=3", None, None),
        ("preview.seeds[0]=7", ("preview", "seeds", 0), 7),
        ("method.ranks.*attn2*=8", ("method", "ranks", "*attn2*"), 8),
        ('method.ranks."*attn2.to_k"=8', ("method", "ranks", "*attn2.to_k"), 8),
        ("preview.prompts=['a = b', 'c']", ("preview", "prompts"), ["a = b", "c"]),
    ],
)
def test_places_in_lists_and_quoted_keys_are_set(override: str, place: tuple[Any, ...] | None, value: Any) -> None:
    table, _, problems = apply_overrides(SMALL, [override])
    assert bool(problems) == (place is None)
    inner: Any = table
    for part in place or ():
        inner = inner[part]
    assert place is None or inner == value


def test_what_was_given_is_left_as_it_was() -> None:
    before = deepcopy(SMALL)
    apply_overrides(SMALL, ["data.folder[0].repeats=3", "data.folder[2].path=x", "preview.seeds=[1]", "steps=4"])
    assert before == SMALL


def test_later_overrides_work_on_what_earlier_ones_made() -> None:
    config = resolve(SMALL, "test", ["data.folder[2].path=birds", "data.folder[2].repeats=4", "steps=5", "steps=6"])
    assert (config.data.folder[2].path, config.data.folder[2].repeats, config.steps) == ("birds", 4, 6)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("data.folder[3].path=x", "`data.folder` has 2 entries, [0] to [1]; [2] would add one"),
        ("data.folder[-1].path=x", "whole numbers from 0"),
        ("data.folder[x].path=x", "whole numbers from 0"),
        ("data.folder.path=x", "`data.folder` is a list in the config; say which entry, as in data.folder[0].path"),
        ("model[0]=x", "`model` is not a list in the config"),
        ("steps.more=1", "`steps` is not a table in the config"),
        ("preview.seeds[1]=3", "`preview.seeds` has no entries; [0] would add one"),
        ("steps", "write it as key=value"),
        ("=3", "write it as key=value"),
    ],
)
def test_what_cannot_be_set_is_refused_with_what_is_there(override: str, what: str) -> None:
    error = told(SMALL, override)
    assert error.source == "--set"
    (problem,) = error.problems
    assert problem.where == f"--set {override}"
    assert what in problem.what


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("steps=many", "found 'many'; allowed: a whole number"),
        ("method.rnak=4", "unknown setting; did you mean `rank`?"),
        ("method.kind=loar", "'loar' is not known"),
        ("data.folder[1].repeats=0", "found 0"),
        ("data.folder[2].repeats=2", "data.folder[2].path: is missing"),
        ("preview.seeds=[1, -1]", "preview.seeds[1]: found -1"),
        ("optimizer.split_groups_mean=best", "found 'best'"),
        ("method.lr.text_encoder=0.5", "method.lr: weighs text_encoder, which is not trained"),
        ("data.bucket_step_px=20", "20 is not a multiple of 8"),
        ("new.section.x=1", "new: unknown setting"),
        ("optimizer.betas=[]", "found [], which has too few entries"),
    ],
)
def test_a_wrong_override_is_named_as_the_place_and_the_file_is_not(override: str, what: str) -> None:
    error = told(SMALL, "steps=200", override, "seed=3")
    assert error.source == "--set"
    (problem,) = error.problems
    assert problem.where == f"--set {override}"
    assert what in problem.what
    assert "config.toml" not in error.text()


def test_a_pair_that_only_an_override_makes_impossible_is_the_overrides() -> None:
    table = SMALL | {"optimizer": {"prodigy_steps": 50}}
    resolve(table, "config.toml")
    error = told(table, "steps=10")
    assert error.source == "--set"
    assert "optimizer.prodigy_steps: 50 lies beyond steps = 10" in places(error)["--set steps=10"]


def test_mistakes_of_the_file_and_of_overrides_are_told_together_each_at_its_place() -> None:
    table = SMALL | {"method": {"kind": "lora", "rnak": 4}, "timesteps": {"first": 5, "last": 5}}
    error = told(table, "steps=many", "method.rank=x", "nonsense")
    assert [problem.where for problem in error.problems] == [
        "method.rnak",
        "timesteps.first",
        "--set steps=many",
        "--set method.rank=x",
        "--set nonsense",
    ]
    assert error.text().startswith("config.toml: 5 problems\n  method.rnak")


@settings(deadline=None)
@given(table=spoilt())
def test_a_config_without_overrides_is_never_blamed_on_one(table: dict[str, Any]) -> None:
    for problem in draft_of(overridden(table, "config.toml", ())).problems:
        assert not problem.where.startswith("--set")


@settings(deadline=None)
@given(table=spoilt(), override=st.sampled_from(["seed=x", "steps=x", "data.folder[0].repeats=x", "model.vae=1"]))
def test_a_wrong_override_is_found_in_whatever_config_it_fits(table: dict[str, Any], override: str) -> None:
    written = overridden(table, "config.toml", [override])
    if not written.problems:
        with pytest.raises(UserError) as caught:
            draft_of(written).require_sound()
        assert f"--set {override}" in [problem.where for problem in caught.value.problems]


def test_no_words_of_the_checking_library_are_told() -> None:
    table = {
        "name": 5,
        "steps": "x",
        "model": {"path": "m", "no_caption": 5},
        "method": {"kind": "lora", "targets": 5, "alpha": "x", "layer_weights": 5},
        "data": {"folder": [{"path": "p", "flip": "x", "exclude": 5, "repeats": "x"}], "max_aspect": []},
        "preview": {"prompts": "x", "seeds": [1.5]},
    }
    with pytest.raises(UserError) as told:
        resolve(table, "test")
    text = told.value.text()
    assert not re.search(r"valid|instance|integer|boolean|dictionary|[Ii]nput|should", text), text
    for what in ("a whole number", "a number", "a text in quotes", "true or false", "a list in brackets"):
        assert what in text, text
