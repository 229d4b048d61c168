"""A VAE can be named on its own, in any layout, and a checkpoint without one needs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtrain.config.schema import ModelConfig
from sdtrain.families.modelspec import Description
from sdtrain.families.original_names import OLD_VAE_ATTENTION, places_of
from sdtrain.families.sdxl import SDXL
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.inspect import inspect_model, open_model
from sdtrain.models.checkpoints.single_file import write_single_file

TINY = BUILTIN_FOLDER / "tiny-sdxl"
VAE = "first_stage_model."


def load(path: Path, **settings: str) -> Components:
    config = ModelConfig(path=str(path), components=str(TINY), **settings)
    assert inspect_model(config)[1] == []
    return load_components(open_model(config, "model"), torch.float32)


def assert_same_vae(one: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def without_vae(rewrite) -> Path:
    return rewrite(lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(VAE)})


def test_a_checkpoint_without_vae_needs_one(without_vae: Path, single_file: Path, tiny: Components) -> None:
    facts, problems = inspect_model(ModelConfig(path=str(without_vae), components=str(TINY)))
    assert facts is None and [problem.where for problem in problems] == ["model.vae"]
    assert str(without_vae) in problems[0].what and "name one here" in problems[0].what


def test_a_vae_comes_from_a_folder_or_a_whole_model(without_vae: Path, tiny: Components) -> None:
    for vae in (TINY, TINY / "vae"):
        assert_same_vae(load(without_vae, vae=str(vae)).vae, tiny.vae)


def wide_vae() -> torch.nn.Module:
    """A VAE as the published ones are: 32 norm groups and attention in the middle."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, scaling_factor=0.13025, force_upcast=True,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def original(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = vae.state_dict()
    return {
        place.key: (state[name][..., None, None] if place.form == "convolution" else state[name]).contiguous()
        for name, place in places_of(SDXL, "vae", state).items()
    }


@pytest.mark.parametrize("layout", ["prefix", "bare", "squeezed", "diffusers", "old diffusers"])
def test_a_vae_comes_from_a_file_in_any_layout(without_vae: Path, tmp_path: Path, layout: str) -> None:
    vae = wide_vae()
    tensors = original(vae)
    if layout in ("bare", "squeezed"):
        tensors = {name.removeprefix(VAE): value for name, value in tensors.items()}
    if layout == "squeezed":
        tensors = {
            name: value.flatten(1) if "attn_1" in name and value.dim() == 4 else value
            for name, value in tensors.items()
        }
    if "diffusers" in layout:
        tensors = vae.state_dict()
    if layout == "old diffusers":
        for new, old in OLD_VAE_ATTENTION.items():
            tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for name, v in tensors.items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    read = load(without_vae, vae=str(tmp_path / "vae.safetensors"))
    assert_same_vae(read.vae, vae)
    assert read.vae.config.scaling_factor == 0.13025


def test_old_names_in_a_folder_are_read(tmp_path: Path) -> None:
    vae = wide_vae()
    folder = shutil.copytree(TINY, tmp_path / "model")
    tensors = vae.state_dict()
    for new, old in OLD_VAE_ATTENTION.items():
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for name, v in tensors.items()}
    save_file(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "vae" / "config.json").write_text(json.dumps(dict(vae.config)))
    assert_same_vae(load(folder).vae, vae)


def test_another_vae_is_written_with_the_model(without_vae: Path, tmp_path: Path) -> None:
    vae = wide_vae()
    save_file(original(vae), tmp_path / "vae.safetensors")
    read = load(without_vae, vae=str(tmp_path / "vae.safetensors"))
    write_single_file(read, tmp_path / "whole.safetensors", Description(title="whole", resolution_px=(128, 128)))
    written = load_file(tmp_path / "whole.safetensors")
    assert all(torch.equal(written[name], value) for name, value in original(vae).items())
    assert_same_vae(load(tmp_path / "whole.safetensors").vae, vae)


def test_something_else_named_as_vae_is_refused(single_file: Path, without_vae: Path) -> None:
    config = ModelConfig(path=str(single_file), components=str(TINY), vae=str(without_vae))
    _, problems = inspect_model(config)
    assert [problem.where for problem in problems] == ["model.vae"] and "neither a VAE" in problems[0].what
    config = ModelConfig(path=str(single_file), components=str(TINY), vae="/nowhere.safetensors")
    assert "no such file" in inspect_model(config)[1][0].what
