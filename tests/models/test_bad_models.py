"""What cannot be trained is refused at check time, in one line with the file, the key and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sdtrain.config.schema import ModelConfig
from sdtrain.errors import UserError
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.models.checkpoints.components import load_components
from sdtrain.models.checkpoints.inspect import inspect_model, open_model
from sdtrain.models.checkpoints.tokenizers import TokenizerSource, load_tokenizer

BUILTIN = "builtin:tiny-sdxl"
IN = "model.diffusion_model.input_blocks.0.0.weight"


def only_problem(path: Path | str, **settings: str) -> tuple[str, str]:
    """The one thing that is wrong, at check time; loading refuses as well."""
    config = ModelConfig(path=str(path), **{"components": BUILTIN, **settings})
    facts, problems = inspect_model(config)
    assert facts is None and len(problems) == 1, problems
    with pytest.raises(UserError):
        load_components(open_model(config, "model"), torch.float32)
    return problems[0].where, problems[0].what


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"anything")
    where, what = only_problem(path)
    assert where == "model.path" and str(path) in what and "pickle" in what and ".safetensors" in what


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 and more", "pickle under another name"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"\xff" * 100, "not a safetensors file"),
        ((20).to_bytes(8, "little") + b"{'not': 'json'}     ", "damaged safetensors header"),
        ((2).to_bytes(8, "little") + b"[]", "damaged safetensors header"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    where, what = only_problem(path)
    assert where == "model.path" and str(path) in what and said in what


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9999])
def test_a_cut_off_download_is_found_at_any_place(single_file: Path, tmp_path: Path, share: float) -> None:
    content = single_file.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(len(content) * share)])
    _, what = only_problem(path)
    assert "cut off" in what and "fetch it again" in what


def test_bytes_too_many_are_found(single_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(single_file.read_bytes() + b"xx")
    assert "2 bytes more" in only_problem(path)[1]


def test_a_header_that_lies_about_places_is_found(single_file: Path, tmp_path: Path) -> None:
    content = single_file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[IN]["shape"] = [7, *header[IN]["shape"][1:]]
    text = json.dumps(header).encode()
    path = tmp_path / "lies.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert "damaged safetensors header" in only_problem(path)[1]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    where, what = only_problem(tmp_path / "nothing.safetensors")
    assert where == "model.path" and "no such file" in what and "nothing.safetensors" in what


def test_an_unknown_built_in_name_gets_the_list() -> None:
    assert "builtin:tiny-sdxl" in only_problem("builtin:tiny")[1]


def test_an_inpainting_model_is_refused(rewrite) -> None:
    path = rewrite(lambda tensors: tensors.update({IN: torch.zeros(32, 9, 3, 3)}))
    _, what = only_problem(path)
    assert IN in what and "9 input channels" in what and "inpainting" in what


def test_a_refiner_is_refused(rewrite) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: value for name, value in tensors.items() if "embedders.0." not in name}
        return {name.replace("embedders.1.", "embedders.0."): value for name, value in kept.items()}

    _, what = only_problem(rewrite(change))
    assert "refiner" in what and "base model" in what


def test_a_lora_given_as_a_model_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 8)}, path)
    _, what = only_problem(path)
    assert "LoRA" in what and "model.path" in what


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("encoder.conv_in.weight", "model.vae"),
        ("down_blocks.0.resnets.0.conv1.weight", "model_index.json"),
        ("double_blocks.0.img_attn.qkv.weight", "another family"),
        ("something.weight", "not a Stable Diffusion checkpoint"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, key: str, said: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(4, 4)}, path)
    assert said in only_problem(path)[1]


def test_an_edm_model_is_refused(rewrite) -> None:
    assert "EDM" in only_problem(rewrite(lambda tensors: tensors.update({"edm_mean": torch.zeros(4)})))[1]


def test_a_file_without_text_encoders_is_refused(rewrite) -> None:
    path = rewrite(lambda tensors: {name: value for name, value in tensors.items() if "conditioner" not in name})
    assert "no text encoders" in only_problem(path)[1]


def test_a_missing_tensor_is_named(rewrite) -> None:
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    path = rewrite(lambda tensors: {name: value for name, value in tensors.items() if name != key})
    with pytest.raises(UserError, match=r"input_blocks.1.0.in_layers.2.weight +is missing"):
        load_components(open_model(ModelConfig(path=str(path), components=BUILTIN), "model"), torch.float32)


def test_a_tensor_of_another_shape_is_named(rewrite) -> None:
    key = "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_fc.weight"
    path = rewrite(lambda tensors: tensors.update({key: torch.zeros(192, 97)}))
    with pytest.raises(UserError, match=r"resblocks.2.mlp.c_fc.weight +has shape \[192, 97\], but \[192, 96\]"):
        load_components(open_model(ModelConfig(path=str(path), components=BUILTIN), "model"), torch.float32)


def test_a_tensor_too_many_is_named(rewrite) -> None:
    key = "model.diffusion_model.input_blocks.1.0.gate.weight"
    path = rewrite(lambda tensors: tensors.update({key: torch.zeros(2)}))
    with pytest.raises(UserError, match=r"gate.weight +has no place in the network"):
        load_components(open_model(ModelConfig(path=str(path), components=BUILTIN), "model"), torch.float32)


def test_leftovers_of_other_writers_are_no_problem(rewrite) -> None:
    leftovers = {
        "conditioner.embedders.0.transformer.text_projection.weight": torch.zeros(64, 64),
        "conditioner.embedders.1.model.attn_mask": torch.zeros(77, 77),
        "model_ema.decay": torch.zeros(()),
        "denoiser.sigmas": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    path = rewrite(lambda tensors: tensors.update(leftovers))
    load_components(open_model(ModelConfig(path=str(path), components=BUILTIN), "model"), torch.float32)


def test_a_projection_that_is_written_as_a_layer_is_the_same_projection(rewrite) -> None:
    """Playground's files have it so, the other way round than a matrix that text is multiplied with."""
    key = "conditioner.embedders.1.model.text_projection"

    def as_layer(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{key}.weight"] = tensors.pop(key).T.contiguous()

    paths = rewrite(lambda _: None, name="plain.safetensors"), rewrite(as_layer)
    config = [ModelConfig(path=str(path), components=BUILTIN) for path in paths]
    plain, other = (load_components(open_model(one, "model"), torch.float32).networks for one in config)
    for name, network in plain.items():
        for parameter, value in network.state_dict().items():
            assert torch.equal(other[name].state_dict()[parameter], value), parameter


def test_eight_bit_weights_are_refused(rewrite) -> None:
    path = rewrite(lambda tensors: tensors.update({IN: tensors[IN].to(torch.float8_e4m3fn)}))
    with pytest.raises(UserError, match="F8_E4M3, which cannot be trained"):
        load_components(open_model(ModelConfig(path=str(path), components=BUILTIN), "model"), torch.float32)


FOLDER_JSON = [
    *("unet/config.json", "vae/config.json", "text_encoder/config.json", "text_encoder_2/config.json"),
    *("tokenizer/tokenizer.json", "tokenizer_2/tokenizer_config.json", "scheduler/scheduler_config.json"),
]


@pytest.mark.parametrize("name", FOLDER_JSON)
@pytest.mark.parametrize("content", ["[" * 100_000, '"a string"', "[]", '{"a":'], ids=["deep", "text", "list", "cut"])
def test_damaged_json_of_a_folder_is_found_by_check(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / "model"
    shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl", path)
    (path / name).write_text(content)
    _, what = only_problem(path, components="")
    assert name in what, what


@pytest.mark.parametrize("content", ['{"a": 1}', '{"model": {}, "added_tokens": [], "version": "1.0"}'])
def test_a_tokenizer_of_another_form_is_a_sentence(tmp_path: Path, content: str) -> None:
    shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl" / "tokenizer", tmp_path / "words")
    (tmp_path / "words" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="holds no CLIP tokenizer that can be read"):
        load_tokenizer(TokenizerSource(tmp_path / "words"))


def test_an_unpublished_shape_without_a_config_is_not_guessed(rewrite, tmp_path: Path) -> None:
    shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl" / "tokenizer", tmp_path / "words" / "tokenizer")
    shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl" / "tokenizer_2", tmp_path / "words" / "tokenizer_2")
    path = rewrite(lambda tensors: None, metadata={})
    _, what = only_problem(path, components=str(tmp_path / "words"))
    assert "unet/config.json" in what and "model.components" in what


# ---- folders ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the built-in model to spoil."""
    return shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl", tmp_path / "model")


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, single_file: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert "not a diffusers folder" in only_problem(tmp_path / "pictures")[1]
    shutil.copy(single_file, tmp_path / "pictures")
    assert "did you mean the file tiny.safetensors" in only_problem(tmp_path / "pictures")[1]


def test_a_missing_part_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    assert only_problem(folder) == (
        "model.vae",
        f"{folder} holds no VAE: name one here, a folder or a .safetensors file",
    )


def test_a_variant_that_is_not_there_is_refused(folder: Path) -> None:
    _, what = only_problem(folder, variant="fp16")
    assert "diffusion_pytorch_model.fp16.safetensors is missing" in what and "leave model.variant empty" in what


def test_a_folder_with_only_a_variant_names_it(folder: Path) -> None:
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert "set model.variant to fp16" in only_problem(folder)[1]
    load_components(open_model(ModelConfig(path=str(folder), variant="fp16"), "model"), torch.float32)


def test_a_folder_of_pickles_is_refused(folder: Path) -> None:
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.bin is a pickle" in only_problem(folder)[1]


def test_a_cut_off_part_of_a_folder_is_found(folder: Path) -> None:
    path = folder / "text_encoder_2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    _, what = only_problem(folder)
    assert str(path) in what and "cut off" in what


def test_an_inpainting_folder_is_refused(folder: Path) -> None:
    edit(folder / "unet" / "config.json", in_channels=9)
    assert "in_channels is 9" in only_problem(folder)[1]


def test_a_refiner_folder_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    assert "refiner" in only_problem(folder)[1]


@pytest.mark.parametrize(
    ("part", "settings", "said"),
    [
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is squaredcos"),
        ("unet/config.json", {"block_out_channels": 5}, "block_out_channels"),
    ],
)
def test_configs_that_make_no_model_are_refused(folder: Path, part: str, settings: dict, said: str) -> None:
    edit(folder / part, **settings)
    _, problems = inspect_model(ModelConfig(path=str(folder)))
    assert len(problems) == 1 and said in problems[0].what


def test_a_config_that_does_not_build_is_refused(folder: Path) -> None:
    edit(folder / "unet" / "config.json", up_block_types=["UpBlock2D"])
    with pytest.raises(UserError, match="describes no network"):
        load_components(open_model(ModelConfig(path=str(folder)), "model"), torch.float32)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer_2")
    where, what = only_problem(folder, components="")
    assert where == "model.components" and "tokenizer_2" in what and "vocab.json" in what


def test_a_folder_in_shards_is_read(folder: Path, tiny) -> None:
    from safetensors.torch import load_file, save_file

    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(plain)
    names = sorted(tensors)
    shards = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / "unet" / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    plain.unlink()
    read = load_components(open_model(ModelConfig(path=str(folder)), "model"), torch.float32)
    assert all(torch.equal(value, read.unet.get_parameter(name)) for name, value in tiny.unet.named_parameters())
