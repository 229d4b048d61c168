"""Dates, steps, resolution and config have one meaning, in whatever file they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sdtrain.adapters.formats.describe import describe_file
from sdtrain.adapters.low_rank import RankRule
from sdtrain.commands.files.export import export_run
from sdtrain.commands.files.extract import resize_lora
from sdtrain.commands.files.merge import merge, read_base, trained_size
from sdtrain.config.schema import ModelConfig
from sdtrain.families.metadata import (
    CONFIG_KEY,
    now,
    resolution_entry,
    resolution_of,
    steps_entry,
    steps_of,
)
from sdtrain.families.modelspec import Description
from sdtrain.families.sd import SD1, SD2
from sdtrain.families.sdxl import SDXL
from sdtrain.files.header import read_header
from sdtrain.models.checkpoints.inspect import open_model

SDTRAIN = Path(__file__).parent.parent.parent / "sdtrain"
Train = Callable[..., tuple[Path, str]]


def test_what_is_written_is_what_is_read() -> None:
    assert steps_of(steps_entry(1200)) == 1200
    assert steps_of(steps_entry(0)) == steps_of({}) == 0
    assert resolution_of(resolution_entry((1024, 768))) == (1024, 768)
    assert resolution_of({}) is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", now())


def test_older_checkpoints_still_say_their_step() -> None:
    assert steps_of({"sdtrain.step": "7"}) == 7


@pytest.mark.parametrize("said", ["", "many", "-3", "1e3", "²", "9" * 5000])
def test_what_others_wrote_there_is_no_number_of_steps(said: str) -> None:
    assert steps_of({"ss_steps": said}) == 0


@pytest.mark.parametrize("said", ["", "1024", "1024x", "(1024, 1024)", "9" * 5000 + "x1"])
def test_what_others_wrote_there_is_no_resolution(said: str) -> None:
    assert resolution_of({"modelspec.resolution": said}) is None


def test_a_lora_and_a_checkpoint_of_one_run_say_the_same(train: Train, tmp_path: Path) -> None:
    run, _ = train({"steps": 2})
    lora = read_header(run / "weights" / "small.safetensors").metadata
    whole = read_header(export_run(run, "single-file", None, tmp_path / "whole.safetensors").path).metadata
    for key in ("ss_steps", "modelspec.resolution", CONFIG_KEY):
        assert lora[key] == whole[key], key
    assert steps_of(whole) == describe_file(tmp_path / "whole.safetensors").steps == 2
    assert resolution_of(lora) == (96, 96)
    for said in (lora, whole):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", said["modelspec.date"])
    # What is made of them says so too.
    merge(str(tmp_path / "whole.safetensors"), [], tmp_path / "merged.safetensors", "single-file", "builtin:tiny-sdxl")
    assert resolution_of(read_header(tmp_path / "merged.safetensors").metadata) == (96, 96)
    resize_lora(run / "weights" / "small.safetensors", "builtin:tiny-sdxl", RankRule(1), tmp_path / "r.safetensors")
    resized = read_header(tmp_path / "r.safetensors").metadata
    assert (resolution_of(resized), steps_of(resized)) == ((96, 96), 2)


def test_a_merged_model_keeps_the_author_and_the_licence_of_its_base(tmp_path: Path) -> None:
    model, size = read_base("builtin:tiny-sdxl")
    described = Description("base", size, author="Ada", license="CC-BY-4.0")
    model.write_checkpoint(tmp_path / "base.safetensors", described, layout="single-file")
    merge(str(tmp_path / "base.safetensors"), [], tmp_path / "merged.safetensors", "single-file", "builtin:tiny-sdxl")
    found = read_header(tmp_path / "merged.safetensors").metadata
    assert (found["modelspec.author"], found["modelspec.license"]) == ("Ada", "CC-BY-4.0")
    assert found["modelspec.title"] == "merged"


def test_a_base_that_says_nothing_has_the_size_of_its_family() -> None:
    opened = open_model(ModelConfig(path="builtin:tiny-sdxl"), "model")
    assert trained_size(opened) == SDXL.native_resolution(predicts_v=False) == (1024, 1024)
    assert SD1.native_resolution(predicts_v=False) == SD2.native_resolution(predicts_v=False) == (512, 512)
    assert SD2.native_resolution(predicts_v=True) == (768, 768)


def test_the_key_of_the_config_stands_once_and_dates_are_made_in_one_place() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in SDTRAIN.rglob("*.py")}
    places = {'"sdtrain.config"': {"metadata.py"}, '"ss_steps"': {"metadata.py"}}
    places["datetime.now"] = {"metadata.py", "one_process.py"}  # the other says since when a run is trained
    for word, expected in places.items():
        assert {path.name for path, text in texts.items() if word in text} == expected, word
