"""What its author says of a file stands in every file of a run, and is not lost in what is made of it."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from sdtrain.adapters.low_rank import RankRule
from sdtrain.commands.check import check_config
from sdtrain.commands.files.export import export_run
from sdtrain.commands.files.extract import extract_lora, resize_lora
from sdtrain.commands.files.info import file_info
from sdtrain.commands.files.merge import merge
from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from sdtrain.data.buckets import bucket_sizes, place
from sdtrain.errors import UserError
from sdtrain.files.header import read_header
from tests.conftest import SIZES, merged

Train = Callable[..., tuple[Path, str]]
BASE = "builtin:tiny-sdxl"
SAID = {
    "author": "Ada",
    "license": "CC-BY-4.0",
    "description": "red things, [bold]drawn[/]",
    "tags": ["red", "things"],
    "usage_hint": "strength 0.8",
}
ABOUT = {f"export.about.{key}": value for key, value in SAID.items()}
KEYS = ("author", "license", "description", "tags", "trigger_phrase", "usage_hint")
WORDS = ["Ada", "CC-BY-4.0", SAID["description"], "red, things", "zorbit", "strength 0.8"]


def metadata(path: Path) -> dict[str, str]:
    return read_header(path).metadata


def words(path: Path) -> list[str]:
    return [metadata(path).get(f"modelspec.{key}", "") for key in KEYS]


@pytest.fixture
def with_trigger(table: dict[str, Any]) -> dict[str, Any]:
    """What to change in a run so that its author says something, with the trigger left to the folder."""
    path = table["data"]["folder"][0]["path"]
    return {**ABOUT, "steps": 2, "data.folder": [{"path": path, "trigger": "zorbit"}], "optimizer.d0": 1e-2}


def test_what_the_author_says_stands_in_every_file_and_in_all_that_is_made_of_it(
    train: Train, with_trigger: dict[str, Any], tmp_path: Path
) -> None:
    run, _ = train(with_trigger)
    lora = run / "weights" / "small.safetensors"
    peft = export_run(run, "diffusers", None, tmp_path / "peft.safetensors").path
    whole = export_run(run, "single-file", None, tmp_path / "whole.safetensors").path
    folder = export_run(run, "folder", None, tmp_path / "folder").path / "unet" / "diffusion_pytorch_model.safetensors"
    resize_lora(lora, BASE, RankRule(1), tmp_path / "resized.safetensors")
    extract_lora(BASE, str(whole), RankRule(2), "attention", tmp_path / "extracted.safetensors", BASE)
    merge(str(whole), [], tmp_path / "merged.safetensors", "single-file", BASE)
    made = [tmp_path / f"{name}.safetensors" for name in ("resized", "extracted", "merged")]
    for path in (lora, peft, whole, folder, *made):
        assert words(path) == WORDS, path
    origin = metadata(lora)
    for path in made[:2]:
        found = metadata(path)
        for key in ("sdtrain.d", "ss_tag_frequency", "ss_steps", "modelspec.resolution", "ss_bucket_info"):
            assert json_or_text(found[key]) == json_or_text(origin[key]), (path, key)
        assert found["modelspec.title"] == path.stem
        assert found["modelspec.hash_sha256"] != origin["modelspec.hash_sha256"]
        assert not {"sdtrain.no_caption", "sdtrain.configs"} & found.keys(), "a LoRA is no model"
    assert "sdtrain.no_caption" in metadata(whole)
    assert metadata(made[0])["ss_network_dim"] == "1", "what is about the file itself is made anew"


def json_or_text(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else text


def test_the_implementation_is_the_code_whose_names_the_tensors_have(train: Train, tmp_path: Path) -> None:
    run, _ = train({"steps": 1})
    found = {
        kind: metadata(export_run(run, kind, None, tmp_path / f"{kind}.safetensors").path)["modelspec.implementation"]
        for kind in ("sd-scripts", "diffusers", "single-file")
    }
    original = "https://github.com/Stability-AI/generative-models"
    assert found == {"sd-scripts": original, "diffusers": "diffusers", "single-file": original}


def test_the_cards_of_web_interfaces_find_buckets_folders_and_when_it_began(
    train: Train, pictures: Path, table: dict[str, Any]
) -> None:
    before = datetime.now(UTC).timestamp()
    run, _ = train({"steps": 1, "data.folder": [{"path": str(pictures), "repeats": 3}], "checkpoint.every": 1})
    first = metadata(run / "weights" / "small.safetensors")
    info = json.loads(first["ss_bucket_info"])
    sizes = bucket_sizes(96, 32, 2.5)
    expected = Counter(place(*size, sizes).bucket for size in SIZES)
    told = {tuple(bucket["resolution"]): bucket["count"] for bucket in info["buckets"].values()}
    assert told == {size: 3 * count for size, count in expected.items()}
    errors = [abs(width / height - (b := place(width, height, sizes).bucket)[0] / b[1]) for width, height in SIZES]
    assert info["mean_img_ar_error"] == pytest.approx(sum(errors) / len(SIZES))
    assert json.loads(first["ss_dataset_dirs"]) == {pictures.name: {"n_repeats": 3, "img_count": len(SIZES)}}
    began = float(first["ss_training_started_at"])
    assert before - 1 <= began <= datetime.now(UTC).timestamp()
    about = json.loads((run / "about.json").read_text())
    (run / "about.json").write_text(json.dumps({**about, "started": "2026-01-02T03:04:05Z"}))
    train({"steps": 2, "data.folder": [{"path": str(pictures), "repeats": 3}], "checkpoint.every": 1}, resume=True)
    again = metadata(run / "weights" / "small.safetensors")
    assert float(again["ss_training_started_at"]) == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()


def test_the_thumbnail_is_the_first_picture_of_the_newest_preview_as_a_small_jpeg(train: Train) -> None:
    run, _ = train({"steps": 2, "preview.every": 1, "preview.seeds": [0, 5], "export.about.thumbnail": "preview"})
    for older in ("step-000000.png", "step-000001.png"):
        Image.new("RGB", (400, 400)).save(run / "previews" / older)
    again = export_run(run, "sd-scripts", None, run / "again.safetensors").path
    head, _, data = metadata(again)["modelspec.thumbnail"].partition(",")
    assert metadata(run / "weights" / "small.safetensors")["modelspec.thumbnail"] == f"{head},{data}"
    assert head == "data:image/jpeg;base64"
    with (
        Image.open(io.BytesIO(base64.b64decode(data))) as small,
        Image.open(run / "previews" / "step-000002.png") as grid,
    ):
        told = json.loads(grid.text["sdtrain cells"])  # type: ignore[attr-defined]
        (x, y), (width, height) = told["corners"][0][0], told["size"]
        cell = grid.convert("RGB").crop((x, y, x + width, y + height)).resize(small.size)
        assert small.format == "JPEG"
        assert max(small.size) <= 256
        pairs = zip(small.tobytes(), cell.tobytes(), strict=True)
        assert sum(abs(one - other) for one, other in pairs) / len(cell.tobytes()) < 6


def test_a_thumbnail_of_ones_own_is_checked_before_the_run(table: dict[str, Any], tmp_path: Path, train: Train) -> None:
    Image.new("RGB", (900, 300), "red").save(tmp_path / "mine.png")
    run, _ = train({"steps": 1, "export.about.thumbnail": str(tmp_path / "mine.png")})
    uri = metadata(run / "weights" / "small.safetensors")["modelspec.thumbnail"]
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as small:
        assert small.size == (256, 85)
    (tmp_path / "broken.png").write_bytes((tmp_path / "mine.png").read_bytes()[:100])
    for name, reason in {"nowhere.png": "no such picture", "broken.png": "broken.png"}.items():
        config = merged(table, {"export.about.thumbnail": str(tmp_path / name), "name": "other"})
        path = tmp_path / "config.toml"
        path.write_text(config_to_toml(resolve(config, "test")), encoding="utf-8")
        with pytest.raises(UserError) as raised:
            check_config(path, [], Console(file=io.StringIO()))
        (problem,) = raised.value.problems
        assert problem.where == "export.about.thumbnail"
        assert reason in problem.what


def test_info_shows_what_the_author_says(train: Train, with_trigger: dict[str, Any]) -> None:
    run, _ = train({**with_trigger, "preview.every": 1, "export.about.thumbnail": "preview"})
    out = io.StringIO()
    Console(file=out, width=400).print(file_info(run / "weights" / "small.safetensors"))
    for text in (*WORDS, "image/jpeg, ", "96 x 96 (", f"({len(SIZES)} x 1)"):
        assert text in out.getvalue(), (text, out.getvalue())


def test_words_of_ones_own_stand_instead_of_the_triggers(train: Train, with_trigger: dict[str, Any]) -> None:
    run, _ = train({**with_trigger, "export.about.trigger_words": ["a b", "c"], "steps": 1})
    assert metadata(run / "weights" / "small.safetensors")["modelspec.trigger_phrase"] == "a b, c"
