"""Steps and runs side by side: strength 0 is the base, strength 1 is what was trained, and nothing of a run changes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdtrain.commands.pages.compare import Trained, compare, strengthened
from sdtrain.config.schema import ModelConfig
from sdtrain.errors import UserError
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.models.load import load_model
from sdtrain.training.watching.report.comparison import Comparison, Row, page, sheet, write_comparison

Train = Callable[..., tuple[Path, str]]
METHODS = {
    "lora": {"method.train": ["unet", "text_encoder"], "optimizer.d0": 1e-2},
    "full": {"method": {"kind": "full"}, "optimizer.d0": 1e-3},
}


def base_cells(run: Path, columns: int) -> list[Image.Image]:
    with Image.open(run / "previews" / "base.png") as joined:
        width = joined.width // columns
        return [joined.crop((index * width, 0, (index + 1) * width, joined.height)) for index in range(columns)]


@pytest.mark.parametrize("method", METHODS)
def test_strength_0_is_the_base_and_strength_1_is_the_preview_of_its_step(train: Train, method: str) -> None:
    previews = {"preview.every": 2, "preview.seeds": [0, 5], "checkpoint.every": 2}
    run, _ = train(METHODS[method] | previews)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = compare([run])
    assert [row.label for row in found.rows] == ["step 2", "step 4"]
    base = base_cells(run, 2)
    for row in found.rows:
        for seed in range(2):
            assert found.cell(row, 0, 0, seed).tobytes() == base[seed].tobytes()
    with Image.open(run / "previews" / "step-000004.png") as grid:
        told = json.loads(grid.text["sdtrain cells"])  # type: ignore[attr-defined]
        x, y = told["corners"][0][0]
        width, height = told["size"]
        drawn = grid.convert("RGB").crop((x, y, x + width, y + height)).resize(base[0].size, Image.Resampling.NEAREST)
    trained = found.cell(found.rows[1], 2, 0, 0)
    assert difference(trained, drawn) <= 1.0, "merged and beside: the same up to rounding"
    assert difference(trained, base[0]) > 2.0, "the training moved something, or this test shows nothing"
    half = found.cell(found.rows[1], 1, 0, 0)
    assert difference(half, base[0]) > 0
    assert difference(half, trained) > 0
    assert files == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures, in steps of 255."""
    tensors = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() for picture in (one, other)]
    return float((tensors[0] - tensors[1]).abs().mean())


def test_what_is_lent_comes_back_bit_for_bit() -> None:
    config = ModelConfig(path="builtin:tiny-sdxl")
    opened = open_model(config, "model")
    model = load_model(opened, config, device=torch.device("cpu"), dtype=torch.float32, caption_chunks=1)
    before = {name: value.detach().clone() for name, value in model.networks["unet"].named_parameters()}
    other = {name: value + 1 for name, value in before.items()}
    for strength in (0.5, 1.0, -2.0):
        with strengthened(model, Trained({}, {"unet": other}), strength):
            for name, value in model.networks["unet"].named_parameters():
                torch.testing.assert_close(value, before[name] + strength)
        assert all(torch.equal(value, before[name]) for name, value in model.networks["unet"].named_parameters())


def test_several_runs_stand_side_by_side_and_three_files_tell_it(train: Train, tmp_path: Path) -> None:
    runs = [
        train({"name": name, "steps": steps, "preview.prompts": ["<b>a</b>"]})[0]
        for name, steps in (("one", 1), ("two", 2))
    ]
    found = compare(runs, strengths=[0, 1])
    assert [row.label for row in found.rows] == ["one, 1", "two, 2"]
    path = write_comparison(tmp_path / "out", found)
    text = path.read_text(encoding="utf-8")
    assert "<b>a" not in text
    assert "&lt;b&gt;a" in text
    assert text.count("<img") == 4
    assert "http:" not in text
    assert "https:" not in text
    with Image.open(tmp_path / "out" / "animation.webp") as animation:
        assert animation.n_frames == 3, "the base, and each run"  # type: ignore[attr-defined]
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        cell = found.cell(found.rows[0], 0, 0, 0)
        assert grid.crop((110, 54, 110 + cell.width, 54 + cell.height)).tobytes() == cell.tobytes()


def test_what_cannot_be_drawn_is_told(train: Train) -> None:
    run, _ = train({"preview.prompts": []})
    with pytest.raises(UserError, match=r"no preview\.prompts; say what to draw"):
        compare([run])
    with pytest.raises(UserError, match="no training state of step 3; there are 4"):
        compare([run], ["a"], steps=[3])
    with pytest.raises(UserError, match="there is no run in this folder"):
        compare([run / "nothing"], ["a"])


def test_a_page_of_many_pictures_is_small_and_a_sheet_has_them_all() -> None:
    picture = Image.frombytes("RGB", (256, 256), os.urandom(3 * 256 * 256))
    drawn = [[[picture] * 4] * 12] * 3
    many = Comparison("a", ["p"] * 12, [0, 1, 2, 3], [0, 0.5, 1], [Row(f"step {step}", drawn) for step in range(3)])
    assert len(page(many)) < 5_000_000
    assert sheet(many).height > 48 * 3 * 256
