"""All mistakes are told in one round: none hides another, and none is told twice or for what another did."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdtrain.config.mistakes import all_settings
from sdtrain.config.overrides import apply_overrides
from sdtrain.config.paths import location_of
from sdtrain.config.read import overridden, resolve
from sdtrain.config.write import config_to_toml
from sdtrain.errors import UserError
from sdtrain.models.checkpoints import hub
from sdtrain.training import start
from sdtrain.training.start import draft_run, inspect_run

SECTIONS = ["name", "output", "steps", "model", "method", "timesteps", "noise", "optimizer", "preview", "data"]
"""As they stand in the file of these tests."""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Good and bad pictures, a damaged model, a run."""
    for name in ("good", "other", "unreadable", "uncaptioned"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / "1.png")
        (tmp_path / name / "1.txt").write_text("a caption")
    (tmp_path / "unreadable" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    (tmp_path / "uncaptioned" / "1.txt").unlink()
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "config.toml").write_text(config_to_toml(resolve(spoilt(tmp_path, "run"), "test")))
    return tmp_path


def right(folders: Path) -> dict[str, Any]:
    table = {
        "name": "small",
        "output": str(folders / "runs"),
        "steps": 100,
        "model": {"path": "builtin:tiny-sdxl"},
        "method": {"kind": "lora"},
        "timesteps": {"first": 0},
        "noise": {"offset": 0.0},
        "optimizer": {"d0": 1e-6},
        "preview": {"every": 0},
        "data": {"resolution_px": 64, "folder": [{"path": str(folders / "good")}, {"path": str(folders / "other")}]},
    }
    assert list(table) == SECTIONS
    return table


# (settings to change, place of the problem, part of what is said of it); {} is the folder of the test
MISTAKES = {
    "run": ({"name": "taken"}, "name", "holds a run that was not finished"),
    "type": ({"steps": "many"}, "steps", "found 'many'"),
    "model": ({"model.path": "{}/damaged.safetensors"}, "model.path", "damaged.safetensors"),
    "missing VAE": ({"model.vae": "{}/no-vae"}, "model.vae", "no such file"),
    "unknown": ({"method.rnak": 4}, "method.rnak", "did you mean `rank`?"),
    "rule": ({"timesteps.first": 500, "timesteps.last": 400}, "timesteps.first", "not below"),
    "range": ({"noise.offset": -1.0}, "noise.offset", "found -1.0"),
    "start": ({"method.init_from": "{}/no.safetensors"}, "method.init_from", "no such file"),
    "misplaced": ({"optimizer.batch_size": 4}, "optimizer.batch_size", "did you mean `data.batch_size`?"),
    "size": ({"preview.width_px": 100}, "preview.width_px", "not a multiple of 8"),
    "folder": ({"data.folder[0].path": "{}/nowhere"}, "data.folder[0].path", "no such folder"),
    "picture": ({"data.folder[1].path": "{}/unreadable"}, "{}/unreadable/1.png", "not a picture"),
    "caption": ({"data.folder[1].path": "{}/uncaptioned"}, "{}/uncaptioned/1.png", "no caption"),
}
ORDER = ["run", "type", "model", "missing VAE", "unknown", "start", "rule", "range", "misplaced", "size", "folder"]
ORDER += ["picture", "caption"]


def spoilt(folders: Path, *mistakes: str) -> dict[str, Any]:
    table = right(folders)
    for mistake in mistakes:
        for key, value in MISTAKES[mistake][0].items():
            put(table, key, value.format(folders) if isinstance(value, str) else value)
    return table


def put(table: dict[str, Any], key: str, value: Any) -> None:
    inner: Any = table
    location = location_of(key)
    for part, after in itertools.pairwise(location):
        empty = [dict(table["data"]["folder"][0])] if isinstance(after, int) else {}  # all our lists are of folders
        inner = inner[part] if isinstance(part, int) else inner.setdefault(part, empty)
    inner[location[-1]] = value


def problems(
    table: dict[str, Any], *overrides: str, resume: bool = False, fetch: bool = False
) -> list[tuple[str, str]]:
    try:
        inspect_run(draft_run(overridden(table, "config.toml", overrides), resume=resume), decode=True, fetch=fetch)
    except UserError as error:
        return [(problem.where, problem.what) for problem in error.problems]
    return []


def assert_told(found: list[tuple[str, str]], folders: Path, mistakes: tuple[str, ...]) -> None:
    wanted = [MISTAKES[mistake] for mistake in sorted(mistakes, key=ORDER.index)]
    assert [where for where, _ in found] == [where.format(folders) for _, where, _ in wanted], found
    assert all(what in text for (_, _, what), (_, text) in zip(wanted, found, strict=True)), found


def test_a_right_config_has_no_problems(folders: Path) -> None:
    assert problems(right(folders)) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_mistake_is_one_problem(folders: Path, mistake: str) -> None:
    assert_told(problems(spoilt(folders, mistake)), folders, (mistake,))


PAIRS = [pair for pair in itertools.combinations(MISTAKES, 2) if set(pair) != {"picture", "caption"}]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_mistakes_are_two_problems_in_the_order_of_the_file(folders: Path, pair: tuple[str, str]) -> None:
    assert_told(problems(spoilt(folders, *pair)), folders, pair)


def test_all_mistakes_at_once_are_all_told(folders: Path) -> None:
    all_but_one = tuple(mistake for mistake in MISTAKES if mistake != "caption")
    assert_told(problems(spoilt(folders, *all_but_one)), folders, all_but_one)


@pytest.mark.parametrize("setting", all_settings())
def test_a_wrong_value_of_any_setting_is_one_problem(folders: Path, setting: str) -> None:
    table = right(folders)
    put(
        table,
        setting,
        {"no": "such value"} if not setting.endswith((".lr", "alphas", "ranks", ".stop", "layer_weights")) else -1,
    )
    found = problems(table)
    assert [where for where, _ in found] == [setting], found


@pytest.mark.parametrize("setting", sorted({setting for setting in all_settings() if setting != "method.kind"}))
def test_what_a_misspelt_setting_was_to_be_is_not_judged(folders: Path, setting: str) -> None:
    table = right(folders)
    for folder in table["data"]["folder"]:
        folder["path"] = str(folders / "uncaptioned")  # wrong, unless missing_captions says that it is meant
    del table["data"]["folder"][1]
    put(table, setting + "x", "anything")
    places = [where for where, _ in problems(table)]
    assert places.count(setting + "x") == 1
    of_picture = str(folders / "uncaptioned" / "1.png")
    assert (of_picture in places) == (setting != "data.folder[0].missing_captions")


def test_two_lists_of_mistakes_in_one_section_hide_nothing(folders: Path) -> None:
    table = right(folders)
    for key, value in {
        "data.batch_size": 0,
        "data.bucket_step_px": 20,
        "data.folder[0].repeats": 0,
        "data.folder[0].path": str(folders / "unreadable"),
        "data.folder[1].missing_captions": "none",
        "data.folder[1].path": str(folders / "uncaptioned"),
    }.items():
        put(table, key, value)
    assert [where for where, _ in problems(table)] == [
        "data.folder[0].repeats",
        "data.folder[1].missing_captions",
        str(folders / "unreadable" / "1.png"),
        "data.batch_size",
        "data.bucket_step_px",
    ]


@pytest.mark.parametrize(
    ("wrong", "right_beside_it"),
    [
        ({"data.resolution_px": "large"}, {"data.bucket_step_px": 2048}),
        ({"steps": "many"}, {"optimizer.prodigy_steps": 50}),
        ({"timesteps.last": "end"}, {"timesteps.first": 999}),
        ({"method.train": "text_encoder"}, {"method.lr": {"text_encoder": 0.5}}),
        ({"method.kind": "ful"}, {"model.dtype": "mixed"}),
    ],
    ids=str,
)
def test_a_rule_about_a_wrong_setting_says_nothing(
    folders: Path, wrong: dict[str, Any], right_beside_it: dict[str, Any]
) -> None:
    table = right(folders)
    for key, value in {**wrong, **right_beside_it}.items():
        put(table, key, value)
    assert [where for where, _ in problems(table)] == list(wrong)


@pytest.mark.parametrize("kind", [{}, {"kind": "loar"}, {"kind": 3}], ids=str)
def test_a_method_without_a_kind_does_not_hide_its_other_mistakes(folders: Path, kind: dict[str, Any]) -> None:
    table = right(folders)
    table["method"] = {"rnak": 4, "train": ["vae"], **kind}
    assert sorted(where for where, _ in problems(table)) == ["method.kind", "method.rnak", "method.train[0]"]


def test_mistakes_of_a_resumed_run_are_told_with_all_others(folders: Path) -> None:
    table = spoilt(folders, "run", "unknown", "picture") | {"seed": 5}
    found = problems(table, "noise.offset=0.5", "data.folder[0].repeats=3", "model.dtype=half", resume=True)
    assert [where for where, _ in found] == [
        "method.rnak",
        "data.folder[1].path",
        str(folders / "unreadable" / "1.png"),
        "seed",
        "--set noise.offset=0.5",
        "--set data.folder[0].repeats=3",
        "--set model.dtype=half",
    ]
    assert "was 0 when this run began, is 5 now" in dict(found)["seed"]
    assert "was 1 when this run began, is 3 now" in dict(found)["--set data.folder[0].repeats=3"]


def test_a_run_that_is_not_there_is_told_with_all_others(folders: Path) -> None:
    found = problems(spoilt(folders, "unknown", "folder"), "output=elsewhere", resume=True)
    assert [where for where, _ in found] == ["method.rnak", "data.folder[0].path", "--set output=elsewhere"]
    assert "there is no run in this folder" in found[-1][1]


def test_settings_a_preset_would_have_given_are_not_held_against_a_resumed_run(folders: Path) -> None:
    table = spoilt(folders, "run")
    table["optimizer"] = {"preset": "best"}
    assert [where for where, _ in problems(table, resume=True)] == ["optimizer.preset"]
    table["method"], table["optimizer"] = {"kind": "loar"}, {}
    assert [where for where, _ in problems(table, resume=True)] == ["method.kind"]


def test_nothing_is_fetched_for_a_run_that_cannot_begin(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    fetch: Callable[[str, str], Any] = lambda repository, variant: fetched.append(repository)  # noqa: E731
    monkeypatch.setattr(hub, "fetch_model", fetch)
    monkeypatch.setattr(hub, "cached_model", lambda repository, variant, weights=True: None)
    monkeypatch.setattr(start, "inspect_model", lambda config: pytest.fail("a model that is not here was looked at"))
    table = spoilt(folders, "unknown", "folder")
    table["model"]["path"] = "owner/name"
    assert [where for where, _ in problems(table, fetch=True)] == ["method.rnak", "data.folder[0].path"]
    assert fetched == []


def test_what_was_written_is_left_as_it_was(folders: Path) -> None:
    table = spoilt(folders, *(mistake for mistake in MISTAKES if mistake != "caption"))
    before = deepcopy(table)
    problems(table, "data.folder[0].repeats=3")
    assert table == before
    assert apply_overrides(table, ["steps=3"])[0] != before
