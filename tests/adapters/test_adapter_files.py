"""Files of adapters: whole or not at all, the same bits back, and mistakes told in one line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from sdtrain.adapters.formats.describe import describe_file
from sdtrain.adapters.formats.lora_file import read_lora, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import Adapters, LoraWeights
from sdtrain.adapters.targets import select_modules
from sdtrain.errors import UserError
from sdtrain.files.header import read_header
from sdtrain.files.tensors import planned, write_safetensors

MakeNetworks = Callable[[], dict[str, nn.Module]]
FACTS = FileFacts(
    title="cats",
    date="2026-11-22T15:00:00+00:00",
    prediction="v_prediction",
    resolution_px=(1024, 768),
    steps=1200,
    num_images=20,
    base_model="sdxl.safetensors",
    optimizer="prodigy-schedule-free",
    tag_counts={"10_cat": {"cat": 20, "grün": 3}, "dog": {"cat": 1, "dog": 9}},
    config_toml='name = "cats"\n',
    d={"unet": 1.25e-4, "text_encoder": 3e-5},
)


@pytest.fixture(scope="module")
def networks(make_networks: MakeNetworks) -> dict[str, nn.Module]:
    return make_networks()


def some_lora(networks: dict[str, nn.Module], sizes: list[tuple[int, float]], dtype: torch.dtype) -> Adapters:
    generator = torch.Generator().manual_seed(1)
    found: dict[str, dict[str, LoraWeights]] = {}
    for component, network in networks.items():
        for index, module in enumerate(select_modules(network, "attention")[:6]):
            rank, alpha = sizes[index % len(sizes)]
            out, width = network.get_submodule(module).weight.shape
            down = torch.randn(rank, width, generator=generator).to(dtype)
            up = torch.randn(out, rank, generator=generator).to(dtype)
            found.setdefault(component, {})[module] = LoraWeights(down, up, alpha)
    return found


SIZES = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([1.0, 2.0, 2.5, 3.0, 16.0, 1e-3])), min_size=1, max_size=3
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_sd_scripts_to_diffusers_and_back_is_the_same_file(
    networks: dict[str, nn.Module], tmp_path: Path, sizes: list[tuple[int, float]], dtype: torch.dtype
) -> None:
    first, between, last = (tmp_path / f"{name}.safetensors" for name in ("first", "between", "last"))
    write_lora(first, some_lora(networks, sizes, dtype), networks, names="sd-scripts", facts=FACTS)
    write_lora(between, read_lora(first, networks).adapters, networks, names="diffusers", facts=FACTS)
    write_lora(last, read_lora(between, networks).adapters, networks, names="sd-scripts", facts=FACTS)
    assert first.read_bytes() == last.read_bytes()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.sampled_from(["sd-scripts", "diffusers"]), st.sampled_from([torch.float32, torch.float16]))
def test_the_change_in_a_file_is_the_change_in_memory(
    networks: dict[str, nn.Module], tmp_path: Path, sizes: list[tuple[int, float]], names: str, dtype: torch.dtype
) -> None:
    adapters = some_lora(networks, sizes, torch.float32)
    write_lora(tmp_path / "a.safetensors", adapters, networks, names=names, facts=FACTS, dtype=dtype)
    read = read_lora(tmp_path / "a.safetensors", networks).adapters
    for component, modules in adapters.items():
        assert set(read[component]) == set(modules)
        for module, weights in modules.items():
            assert (read[component][module].delta() - weights.delta()).norm() <= 1e-3 * weights.delta().norm()


@pytest.fixture
def file(networks: dict[str, nn.Module], tmp_path: Path) -> Path:
    path = tmp_path / "cats.safetensors"
    write_lora(path, some_lora(networks, [(4, 2.0)], torch.float16), networks, names="sd-scripts", facts=FACTS)
    return path


def test_the_reference_library_reads_it_and_the_same_weights_give_the_same_bytes(file: Path, networks) -> None:
    again = file.with_name("again.safetensors")
    write_lora(again, some_lora(networks, [(4, 2.0)], torch.float16), networks, names="sd-scripts", facts=FACTS)
    assert file.read_bytes() == again.read_bytes()
    assert len(load_file(file)) == 3 * 18
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.title"] == "cats"


def test_hashes_are_those_that_readers_compute(file: Path) -> None:
    said = read_header(file).metadata
    raw = file.read_bytes()
    data = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert said["sshs_model_hash"] == data
    assert said["modelspec.hash_sha256"] == "0x" + data


def test_the_legacy_hash_is_of_the_file_with_training_notes_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(500_000), "b": torch.randn(70_000).half()}
    said = {"ss_steps": "5", "modelspec.title": "not counted"}
    path = tmp_path / "a.safetensors"
    found = write_safetensors(path, planned(tensors), said, seal=lambda hashes: {"legacy": hashes.legacy})
    raw = save(tensors, {"ss_steps": "5"})
    assert found.legacy == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert read_header(path).metadata["legacy"] == found.legacy


def test_the_header_says_what_other_tools_ask_for(file: Path) -> None:
    said = read_header(file).metadata
    wanted = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": "1024x768",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_steps": "1200",
        "ss_output_name": "cats",
        "ss_sd_model_name": "sdxl.safetensors",
        "ss_num_train_images": "20",
    }
    assert {key: said[key] for key in wanted} == wanted
    assert json.loads(said["ss_tag_frequency"])["10_cat"]["grün"] == 3


def test_describe_reads_it_without_torch(file: Path) -> None:
    found = describe_file(file)
    assert (found.kind, found.names, dict(found.ranks), dict(found.alphas)) == (
        "lora",
        "sd-scripts",
        {4: 18},
        {2.0: 18},
    )
    assert dict(found.num_modules) == {"unet": 6, "text_encoder": 6, "text_encoder_2": 6}
    assert (found.steps, found.base_model, found.d) == (1200, "sdxl.safetensors", dict(FACTS.d))
    assert found.top_tags[0] == ("cat", 21)
    assert found.config_toml == FACTS.config_toml
    code = "import sys, sdtrain.adapters.formats.describe; assert 'torch' not in sys.modules"
    assert os.spawnlp(os.P_WAIT, os.sys.executable, os.sys.executable, "-c", code) == 0


def test_describe_knows_alphas_that_are_kept_in_the_header(networks, tmp_path: Path) -> None:
    for alpha, name in ((2.0, "multiplied in"), (3.0, "kept for diffusers")):
        path = tmp_path / f"{name}.safetensors"
        write_lora(path, some_lora(networks, [(4, alpha)], torch.float32), networks, names="diffusers", facts=FACTS)
        assert dict(describe_file(path).alphas) == {alpha: 18}


# Bad input


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_cut_off_file_says_so(file: Path, networks, share: float) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(UserError, match=r"is cut off: .*fetch it again|is not a safetensors file|is empty"):
        read_lora(file, networks)
    with pytest.raises(UserError):
        describe_file(file)


@pytest.mark.parametrize(
    "text", [b"hello, I am no model at all", b"\x08\0\0\0\0\0\0\0[1, 2,3]", b"\x02\0\0\0\0\0\0\0{}"]
)
def test_other_files_say_so(tmp_path: Path, networks, text: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(text)
    with pytest.raises(UserError):
        read_lora(tmp_path / "x.safetensors", networks)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_is_answered_with_a_traceback(file: Path, networks, data: st.DataObject) -> None:
    raw = bytearray(file.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    start = data.draw(st.integers(0, 8 + header))
    new = data.draw(st.binary(min_size=1, max_size=12))
    damaged = file.with_name("damaged.safetensors")
    damaged.write_bytes(raw[:start] + new + raw[start + len(new) :])
    for look in (describe_file, lambda path: read_lora(path, networks)):
        try:
            look(damaged)
        except UserError as error:
            assert "damaged.safetensors" in str(error)


@pytest.mark.parametrize("key", ["sdtrain.alpha", "lora_adapter_metadata"])
def test_notes_that_are_no_json_are_told(file: Path, networks, key: str) -> None:
    save_file(load_file(file), file, {key: "{"})
    assert describe_file(file).kind == "lora"
    with pytest.raises(UserError, match=f"`{key}` in the header is no JSON table"):
        read_lora(file, networks)


def test_missing_files_pickles_and_checkpoints_say_so(tmp_path: Path, networks) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / "x.safetensors", networks)
    (tmp_path / "x.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        read_lora(tmp_path / "x.ckpt", networks)
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match="whole checkpoint"):
        read_lora(tmp_path / "whole.safetensors", networks)


def test_a_lora_of_sd_1_says_so(tmp_path: Path, networks) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 768), f"{name}.lora_up.weight": torch.zeros(320, 4)}
    save_file(tensors, tmp_path / "sd1.safetensors")
    with pytest.raises(UserError, match=r"SD 1\.x or 2\.x") as caught:
        read_lora(tmp_path / "sd1.safetensors", networks)
    assert "sd1.safetensors" in str(caught.value)
    assert name in str(caught.value)


def test_other_shapes_and_missing_halves_name_the_layer(file: Path, networks) -> None:
    tensors = load_file(file)
    first = next(key for key in tensors if key.startswith("lora_unet") and key.endswith("lora_down.weight"))
    save_file(tensors | {first: torch.zeros(4, 999)}, file)
    with pytest.raises(UserError, match=r"999\), this model's has .*made for another model") as caught:
        read_lora(file, networks)
    assert first.removesuffix(".lora_down.weight") in str(caught.value)
    del tensors[first]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"lacks `lora_down.weight`"):
        read_lora(file, networks)


def test_hundreds_of_wrong_keys_make_few_lines(tmp_path: Path, networks) -> None:
    save_file(
        {f"lora_unet_nothing_{n}.lora_down.weight": torch.zeros(1, 1) for n in range(300)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError, match="and 297 more") as caught:
        read_lora(tmp_path / "a.safetensors", networks)
    assert len(caught.value.problems) == 4


def test_values_that_are_not_finite_are_never_written(networks, tmp_path: Path) -> None:
    adapters = some_lora(networks, [(4, 2.0)], torch.float32)
    next(iter(adapters["unet"].values())).up[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        write_lora(tmp_path / "a.safetensors", adapters, networks, names="sd-scripts", facts=FACTS)
    assert not list(tmp_path.iterdir())


def test_values_too_large_for_the_type_of_the_file_are_told(networks, tmp_path: Path) -> None:
    adapters = some_lora(networks, [(4, 2.0)], torch.float32)
    next(iter(adapters["unet"].values())).up[0, 0] = 1e6
    with pytest.raises(UserError, match="not finite as float16"):
        write_lora(tmp_path / "a.safetensors", adapters, networks, names="sd-scripts", facts=FACTS, dtype=torch.float16)
