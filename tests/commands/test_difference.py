"""Two weight files are told apart: by what each has, by ranks, and by how far apart they are in each block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdtrain.adapters.kinds import Adapters, DoraWeights, LoraWeights, delta
from sdtrain.adapters.shares import Share, block_of
from sdtrain.cli import app
from sdtrain.commands.files.difference import compare_files, lora_difference
from sdtrain.commands.files.merge import merge
from sdtrain.errors import UserError
from sdtrain.models.model import Model
from tests.commands.test_merge import FOLDER, some, write


def test_the_distance_of_two_loras_is_that_of_their_changes_by_block(tiny: Model, tmp_path: Path) -> None:
    first, second = some(tiny, 0), some(tiny, 1, "dora", rank=4)
    one, other = write(tmp_path / "a.safetensors", tiny, first), write(tmp_path / "b.safetensors", tiny, second)
    found = lora_difference(one, other, FOLDER)
    layers = {(name, module) for side in (first, second) for name in side for module in side[name]}
    squares: dict[str, tuple[float, float]] = {}
    for component, module in layers:
        weight = tiny.networks[component].get_parameter(f"{module}.weight").detach()
        pair = [side.get(component, {}).get(module) for side in (first, second)]
        left, right = (torch.zeros_like(weight) if adapter is None else delta(adapter, weight) for adapter in pair)
        block = block_of(component, module)
        name = block if block == component else f"{component} {block}"
        before = squares.get(name, (0.0, 0.0))
        squares[name] = before[0] + float(left.square().sum()), before[1] + float((left - right).square().sum())
    assert found.blocks.keys() == squares.keys() >= {"unet down_blocks.1", "unet mid_block", "text_encoder_2"}
    for name, (whole, apart) in squares.items():
        assert found.blocks[name].share == pytest.approx((apart / (whole or 1.0)) ** 0.5, rel=1e-3), name
    assert found.only_first and found.only_second
    rows = compare_files(one, other, FOLDER)
    assert rows["kind"] == "lora in sd-scripts names | dora in sd-scripts names"
    assert rows["ranks"].startswith("2 (") and " | 4 (" in rows["ranks"]
    assert any(key.startswith("only in a.safetensors") for key in rows)


def test_the_same_change_in_other_matrices_is_no_difference(tiny: Model, tmp_path: Path) -> None:
    adapters = some(tiny, 0)
    doubled: Adapters = {
        component: {
            module: LoraWeights(weights.down * 2, weights.up / 2, weights.alpha)
            for module, weights in modules.items()
            if isinstance(weights, LoraWeights)
        }
        for component, modules in adapters.items()
    }
    files = [
        write(tmp_path / f"{name}.safetensors", tiny, made) for name, made in {"a": adapters, "b": doubled}.items()
    ]
    assert compare_files(*files, FOLDER)["all"] == "the same weights"


def test_two_models_differ_where_a_lora_was_merged_and_nowhere_else(tiny: Model, base: Path, tmp_path: Path) -> None:
    lora = write(tmp_path / "a.safetensors", tiny, {"unet": some(tiny, 0)["unet"]})
    merge(str(base), [(lora, Share(parts=(("down_blocks.*", 0.0),)))], tmp_path / "m.safetensors", "single-file")
    rows = compare_files(base, tmp_path / "m.safetensors")
    assert rows["unet down_blocks.0"] == rows["text_encoder"] == rows["vae"] == rows["other tensors"] == "the same"
    assert "apart" in rows["unet up_blocks.0"]
    assert compare_files(base, base)["all"] == "the same weights"


@pytest.mark.parametrize("key", ["first_stage_model.encoder.conv_in.weight", "model.diffusion_model.out.2.bias"])
def test_one_number_in_a_model_is_seen(base: Path, tmp_path: Path, key: str) -> None:
    tensors = load_file(base)
    tensors[key].view(-1)[3] += 1e-3
    with safe_open(base, "pt") as file:
        save_file(tensors, tmp_path / "other.safetensors", file.metadata())
    rows = compare_files(base, tmp_path / "other.safetensors")
    block = "vae" if key.startswith("first") else "unet conv_out"
    assert "1 of" in rows[block] and rows["all"] != "the same weights"
    assert [name for name, told in rows.items() if "apart" in told] == [block]


def test_what_cannot_be_compared_is_a_sentence(tiny: Model, base: Path, tmp_path: Path) -> None:
    lora = write(tmp_path / "a.safetensors", tiny, some(tiny, 0))
    for arguments, words in {
        (lora, lora): "--base",
        (lora, base): "a whole model",
        (lora, tmp_path / "none.safetensors"): "no such file",
        (lora,): "just two",
        (lora, lora, "--prompt", "x"): "leave them out",
        (tmp_path, "--base", FOLDER): "is for two LoRA files",
    }.items():
        result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
        assert isinstance(result.exception, UserError), result.output
        assert words in str(result.exception)
    result = CliRunner().invoke(app, ["compare", str(lora), str(lora), "--base", FOLDER], catch_exceptions=False)
    assert "the same weights" in result.output


def test_a_dora_is_compared_with_the_weights_it_stands_on(tiny: Model, tmp_path: Path) -> None:
    adapters = some(tiny, 0, "dora")
    plain: Adapters = {
        component: {module: one.direction for module, one in modules.items() if isinstance(one, DoraWeights)}
        for component, modules in adapters.items()
    }
    files = [write(tmp_path / f"{name}.safetensors", tiny, made) for name, made in {"a": adapters, "b": plain}.items()]
    assert lora_difference(*files, FOLDER).blocks["unet mid_block"].share > 0.1
