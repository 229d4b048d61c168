"""Previews without prompts show captions of the run's own pictures, which changes nothing but what is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdtrain.config.read import read_config, resolve
from sdtrain.data.examples import Example, scan_folders
from sdtrain.data.report.previewed import NUM_OWN_PROMPTS, previews_text, with_prompts
from sdtrain.training.watching.grid import CELLS, DRAWN_BY
from tests.conftest import small_run
from tests.test_laws import state_bits, weights_bits

Train = Callable[..., tuple[Path, str]]
OWN = {"preview.every": 2, "preview.prompts": [], "preview.num_inference_steps": 1}
FIRST = [f"a red thing number {index}" for index in range(NUM_OWN_PROMPTS)]


def text_of(path: Path, key: str) -> dict[str, Any]:
    with Image.open(path) as picture:
        found: dict[str, Any] = json.loads(getattr(picture, "text", {})[key])
        return found


def test_previews_without_prompts_show_the_first_captions_and_change_nothing(train: Train) -> None:
    without, _ = train({"name": "without", "preview.prompts": []})
    shown, said = train(OWN | {"name": "with"})
    assert not (without / "previews").exists()
    assert state_bits(without, 4) == state_bits(shown, 4)
    assert weights_bits(without) == weights_bits(shown)
    assert text_of(shown / "previews" / "step-000004.png", CELLS)["prompts"] == FIRST
    assert "sampler" not in text_of(shown / "previews" / "base.png", DRAWN_BY), (
        "as in runs of before there were several"
    )
    assert "3 pictures every 2 steps, of captions of your own pictures: " in said
    assert f'"{FIRST[0]}"' in said
    assert read_config(shown / "config.toml").preview.prompts == FIRST


def pixels_of(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def test_a_run_that_goes_on_equals_one_that_was_not_interrupted_and_keeps_its_prompts(
    train: Train, pictures: Path, tmp_path: Path
) -> None:
    straight, _ = train(OWN | {"name": "straight", "steps": 4})
    train(OWN | {"name": "resumed", "steps": 2})
    resumed, _ = train(OWN | {"name": "resumed", "steps": 4}, resume=True)
    assert state_bits(straight, 4) == state_bits(resumed, 4)
    assert weights_bits(straight) == weights_bits(resumed)
    for name in ("base.png", "step-000004.png"):
        pictures_of = [pixels_of(run / "previews" / name) for run in (straight, resumed)]
        key = DRAWN_BY if name == "base.png" else CELLS
        assert text_of(straight / "previews" / name, key) == text_of(resumed / "previews" / name, key)
        assert name != "base.png" or pictures_of[0] == pictures_of[1]


def test_a_run_that_goes_on_with_other_pictures_keeps_the_prompts_that_the_base_was_drawn_from(
    train: Train, pictures: Path, tmp_path: Path, table: dict[str, Any]
) -> None:
    from sdtrain.commands.fit import fit

    own = tmp_path / "own"
    own.mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(own / f"{index}.png")
        (own / f"{index}.txt").write_text(f"old {index}")
    changes = {**OWN, "data.folder": [{"path": str(own)}], "steps": 1}
    run, _ = train(changes)
    (own / "0.txt").write_text("new")
    table["data"]["folder"] = [{"path": str(own)}]
    table["preview"] |= {"every": 2, "prompts": [], "num_inference_steps": 1}
    fit(resolve(table | {"steps": 2}, "test"), resume=True, accept_data=True)
    cells = text_of(run / "previews" / "step-000002.png", CELLS)
    assert cells["prompts"] == ["old 0", "old 1"]
    assert len(cells["corners"][0]) == 1 and cells["corners"][0][0][0] > 0, "the base's picture stands beside"


def example(caption: str, **more: Any) -> Example:
    return Example(Path("x.png"), caption, 64, 64, 1, **more)


def config_of(tmp_path: Path, **preview: Any) -> Any:
    table = small_run(tmp_path, tmp_path)
    table["data"]["folder"] = [{"path": "a"}, {"path": "b", "regularisation": True}]
    return resolve(table | {"preview": {"every": 5, **preview}}, "test")


@given(st.lists(st.sampled_from(["", "a", "b", "c", "d", "e"])))
def test_the_prompts_are_the_first_distinct_captions(captions: list[str]) -> None:
    examples = [example(caption) for caption in captions]
    prompts = with_prompts(config_of(Path("x")), examples).preview.prompts
    expected: list[str] = []
    for caption in captions:
        if caption and caption not in expected and len(expected) < NUM_OWN_PROMPTS:
            expected.append(caption)
    assert prompts == (expected or [""])


def test_what_is_held_out_and_what_is_known_already_is_passed_over(tmp_path: Path) -> None:
    examples = [example("held out", held_out=True), example("known", folder=1), example("taught")]
    assert with_prompts(config_of(tmp_path), examples).preview.prompts == ["taught"]


def test_none_stays_none_and_prompts_that_are_named_stay(tmp_path: Path) -> None:
    examples = [example("taught")]
    none = config_of(tmp_path, every=0)
    assert with_prompts(none, examples) is none
    assert previews_text(none, examples) == "none"
    named = config_of(tmp_path, prompts=["mine"], seeds=[0])
    assert with_prompts(named, examples) is named
    assert previews_text(named, examples) == "1 picture every 5 steps"


def test_the_order_of_the_pictures_decides_not_that_of_the_disk(tmp_path: Path) -> None:
    for name in ("10", "2", "1"):
        Image.new("RGB", (64, 64), (int(name), 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"number {name}")
    config = resolve(small_run(tmp_path, tmp_path) | {"preview": {"every": 1}}, "test")
    examples, problems = scan_folders(config.data, decode=False)
    assert not problems
    twice = [one for one in examples for _ in range(2)]
    again = [replace(one, resolution_px=64) for one in twice]
    for found in (examples, twice, again):
        assert with_prompts(config, found).preview.prompts == ["number 1", "number 2", "number 10"]


@pytest.mark.parametrize("caption", ["a " * 100, "\x1b[31m"])
def test_what_is_told_is_short(tmp_path: Path, caption: str) -> None:
    examples = [example(caption)]
    assert len(previews_text(with_prompts(config_of(tmp_path), examples), examples)) < 160
