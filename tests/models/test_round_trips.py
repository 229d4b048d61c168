"""What is read is what was written, bit for bit, in every layout and type."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdtrain.config.schema import ModelConfig
from sdtrain.errors import UserError
from sdtrain.families.modelspec import Description
from sdtrain.families.sdxl import SDXL
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.folder import write_folder
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.models.checkpoints.single_file import order_of_weights, weights_of, write_single_file
from sdtrain.models.checkpoints.tokenizers import TokenizerSource, copy_tokenizer, load_tokenizer

BUILTIN = "builtin:tiny-sdxl"
DESCRIPTION = Description(title="tiny", resolution_px=(128, 128), date="2026-01-01T00:00:00Z")


def assert_same_networks(one: Components, other: Components) -> None:
    for component in SDXL.components:
        left, right = one.networks[component].state_dict(), other.networks[component].state_dict()
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), f"{component} {name}"


def load(path: Path, dtype: torch.dtype = torch.float32, components: str = "") -> Components:
    return load_components(open_model(ModelConfig(path=str(path), components=components), "model"), dtype)


def test_a_single_file_through_a_folder_is_the_same_file(single_file: Path, tmp_path: Path) -> None:
    first = load(single_file, components=BUILTIN)
    write_folder(first, tmp_path / "folder", DESCRIPTION)
    second = load(tmp_path / "folder")
    assert_same_networks(first, second)
    write_single_file(second, tmp_path / "again.safetensors", DESCRIPTION)
    assert (tmp_path / "again.safetensors").read_bytes() == single_file.read_bytes()


def test_the_built_in_folder_is_the_same_after_a_single_file(tiny: Components, single_file: Path) -> None:
    assert_same_networks(tiny, load(single_file, components=BUILTIN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_type_comes_back_exactly(tiny: Components, tmp_path: Path, dtype: torch.dtype) -> None:
    write_single_file(tiny, tmp_path / "one.safetensors", DESCRIPTION, dtype=dtype)
    read = load(tmp_path / "one.safetensors", components=BUILTIN)
    assert set(read.stored_dtypes.values()) == {dtype}
    for component in SDXL.components:
        for name, tensor in tiny.networks[component].named_parameters():
            assert torch.equal(tensor.to(dtype).float(), read.networks[component].get_parameter(name))
    write_single_file(read, tmp_path / "two.safetensors", DESCRIPTION)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_networks_compute_what_they_computed(tiny: Components, single_file: Path) -> None:
    read = load(single_file, components=BUILTIN)
    ids = torch.arange(77)[None]
    expected = tiny.networks["text_encoder_2"](ids, output_hidden_states=True)
    got = read.networks["text_encoder_2"](ids, output_hidden_states=True)
    assert torch.equal(expected.text_embeds, got.text_embeds)
    assert torch.equal(expected.hidden_states[-2], got.hidden_states[-2])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 77, 160, generator=torch.Generator().manual_seed(1))
    more = {"text_embeds": got.text_embeds, "time_ids": torch.full((1, 6), 64.0)}
    one, other = (parts.unet(noise, 5, text, added_cond_kwargs=more).sample for parts in (tiny, read))
    assert torch.equal(one, other)
    assert torch.equal(tiny.vae.decode(noise).sample, read.vae.decode(noise).sample)


def test_settings_that_shapes_do_not_tell_travel_in_the_header(tiny: Components, single_file: Path) -> None:
    read = load(single_file, components=BUILTIN)
    assert read.unet.config.attention_head_dim == tiny.unet.config.attention_head_dim
    assert read.unet.config.norm_num_groups == 16
    assert read.vae.config.scaling_factor == tiny.vae.config.scaling_factor
    assert read.networks["text_encoder"].config.hidden_act == "gelu"
    assert read.scheduler_config == tiny.scheduler_config


def test_another_tools_file_borrows_them_from_the_components_folder(tiny: Components, rewrite) -> None:
    bare = rewrite(lambda tensors: None, metadata={"format": "pt"})
    read = load(bare, components=BUILTIN)
    assert_same_networks(tiny, read)
    assert read.unet.config.norm_num_groups == 16
    assert read.networks["text_encoder"].config.num_attention_heads == 2
    assert read.scheduler_config == tiny.scheduler_config


def test_the_header_says_what_the_file_is(single_file: Path) -> None:
    with safe_open(single_file, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.title"] == "tiny"
    assert metadata["modelspec.resolution"] == "128x128"
    assert metadata["modelspec.prediction_type"] == metadata["modelspec.predict_key"] == "v"
    assert {"v_pred", "ztsnr"} <= names


def test_the_hash_is_that_of_the_bytes_after_the_header(single_file: Path) -> None:
    content = single_file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content[8 + length :]).hexdigest()


def test_an_epsilon_model_carries_no_markers(tiny: Components, tmp_path: Path) -> None:
    from dataclasses import replace

    scheduler = {**tiny.scheduler_config, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    write_single_file(replace(tiny, scheduler_config=scheduler), tmp_path / "eps.safetensors", DESCRIPTION)
    with safe_open(tmp_path / "eps.safetensors", "pt") as file:
        assert not {"v_pred", "ztsnr"} & set(file.keys())
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"


def test_what_is_written_are_the_values_of_now(tiny: Components, tmp_path: Path) -> None:
    read = load_components(open_model(ModelConfig(path=BUILTIN), "model"), torch.float32)
    with torch.no_grad():
        read.unet.conv_in.weight.add_(1)
    write_single_file(read, tmp_path / "new.safetensors", DESCRIPTION, dtype=torch.float32)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(load_file(tmp_path / "new.safetensors")[key], tiny.unet.conv_in.weight + 1)


def test_a_change_is_applied_to_every_weight_as_it_is_written(tiny: Components, tmp_path: Path) -> None:
    def change(component: str, name: str, value: torch.Tensor) -> torch.Tensor:
        return value + 1 if (component, name) == ("text_encoder_2", "text_projection.weight") else value

    write_single_file(tiny, tmp_path / "new.safetensors", DESCRIPTION, dtype=torch.float32, change=change)
    written = load_file(tmp_path / "new.safetensors")["conditioner.embedders.1.model.text_projection"]
    assert torch.equal(written, tiny.networks["text_encoder_2"].text_projection.weight.T + 1)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_order_in_which_weights_are_asked_for_is_known_before(
    tiny: Components, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    asked: list[tuple[str, str]] = []

    def note(component: str, name: str, weight: torch.Tensor) -> torch.Tensor:
        asked.append((component, name))
        return weight

    write_single_file(tiny, tmp_path / "noted.safetensors", DESCRIPTION, dtype=dtype, change=note)
    assert asked == order_of_weights(tiny, dtype)
    every = {(component, name) for component in SDXL.components for name in weights_of(tiny.networks[component])}
    assert set(asked) == every and len(asked) == len(every)


def test_adapters_stay_out_of_the_file(tmp_path: Path, single_file: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    read = load_components(open_model(ModelConfig(path=BUILTIN), "model"), torch.float32)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "q_proj", "conv1"]), read.unet)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), read.networks["text_encoder"])
    write_single_file(read, tmp_path / "base.safetensors", DESCRIPTION)
    assert (tmp_path / "base.safetensors").read_bytes() == single_file.read_bytes()


def test_a_value_too_large_for_the_type_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    read = load_components(open_model(ModelConfig(path=BUILTIN), "model"), torch.float32)
    with torch.no_grad():
        read.unet.conv_in.weight[0, 0, 0, 0] = 1e6
    for write, name in ((write_single_file, "new.safetensors"), (write_folder, "folder")):
        with pytest.raises(UserError, match="too large for F16"):
            write(read, tmp_path / name, DESCRIPTION, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_anything_is_written(
    tiny: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr("sdtrain.files.writer.shutil.disk_usage", lambda folder: usage)
    for write, name in ((write_single_file, "new.safetensors"), (write_folder, "folder")):
        with pytest.raises(UserError, match=r"disk space.*bytes are needed and 1,000 bytes free"):
            write(tiny, tmp_path / "deep" / name, DESCRIPTION)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_older_file_as_it_was(tiny: Components, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older")

    def fail(component: str, name: str, value: torch.Tensor) -> torch.Tensor:
        if component == "vae" and value.is_floating_point() and name == "decoder.conv_out.weight" and fail.armed:
            raise KeyboardInterrupt
        return value

    fail.armed = False
    write_folder(tiny, tmp_path / "folder", DESCRIPTION, change=fail)
    before = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*"))
    fail.armed = True
    for write, target in ((write_single_file, path), (write_folder, tmp_path / "folder")):
        with pytest.raises(KeyboardInterrupt):
            write(tiny, target, DESCRIPTION, change=fail)
    assert path.read_bytes() == b"older"
    assert sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*")) == before


def test_a_kill_in_the_middle_of_writing_leaves_the_older_file(tiny: Components, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older")

    def die(component: str, name: str, value: torch.Tensor) -> torch.Tensor:
        if (component, name) == ("unet", "conv_out.weight"):
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    for write, target in ((write_single_file, path), (write_folder, tmp_path / "folder")):
        child = os.fork()
        if child == 0:
            write(tiny, target, DESCRIPTION, change=die)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == b"older" and not (tmp_path / "folder").exists()
    write_single_file(tiny, path, DESCRIPTION)
    write_folder(tiny, tmp_path / "folder", DESCRIPTION)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "model.safetensors"]


def test_a_folder_replaces_an_older_model_but_nothing_else(tiny: Components, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("dear")
    with pytest.raises(UserError, match="no diffusers folder"):
        write_folder(tiny, tmp_path / "letters", DESCRIPTION)
    for _ in range(2):
        write_folder(tiny, tmp_path / "model", DESCRIPTION)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["letters", "model"]


def test_a_tokenizer_with_other_padding_is_written_with_it(tmp_path: Path) -> None:
    from sdtrain.files.locations import BUILTIN_FOLDER

    source = TokenizerSource(BUILTIN_FOLDER / "tiny-sdxl" / "tokenizer", "!")
    copy_tokenizer(source, tmp_path / "tokenizer_2")
    read = load_tokenizer(TokenizerSource(tmp_path / "tokenizer_2"))
    second = load_tokenizer(TokenizerSource(BUILTIN_FOLDER / "tiny-sdxl" / "tokenizer_2"))
    assert read.pad_token_id == second.pad_token_id == 0
    assert read.encode("a red star", add_special_tokens=False) == second.encode("a red star", add_special_tokens=False)
    assert (tmp_path / "tokenizer_2" / "vocab.json").is_file()
