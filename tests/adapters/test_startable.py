"""What `check` accepts of a file to start from, `fit` accepts, and the other way round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, adapter_weights, attach_adapters
from sdtrain.adapters.formats.conventions import Names
from sdtrain.adapters.formats.describe import describe_file
from sdtrain.adapters.formats.lora_file import read_lora, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.formats.startable import Kind, start_problems
from sdtrain.adapters.loading.warm_start import start_from
from sdtrain.errors import UserError
from sdtrain.files.header import read_header

Networks = dict[str, nn.Module]
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
FACTS = FileFacts(title="test", date="2026-11-22T15:00:00+00:00")
MORE = ["w_norm", "diff_b", "oft_blocks", "frobnicate", "lora_mid.weight", "hada_t1", "dora_scale", "alpha", "lokr_t2"]
KINDS: list[tuple[Kind, Names]] = [
    ("lora", "sd-scripts"),
    ("lora", "diffusers"),
    ("dora", "sd-scripts"),
    ("dora", "diffusers"),
    ("loha", "sd-scripts"),
    ("lokr", "diffusers"),
    ("oft", "diffusers"),
]


@pytest.fixture(scope="module")
def attached(make_networks: Callable[[], Networks]) -> dict[Kind, Networks]:
    found: dict[Kind, Networks] = {}
    for kind, _ in KINDS:
        networks = found[kind] = make_networks()
        modules = [TO_Q] if kind == "oft" else [TO_Q, CONV]
        attach_adapters(networks["unet"], modules, AdapterSettings(kind, 4), torch.Generator().manual_seed(1))
    return found


def write_attached(path: Path, networks: Networks, names: Names = "sd-scripts") -> None:
    write_lora(path, {"unet": adapter_weights(networks["unet"])}, networks, names=names, facts=FACTS)


def starts(path: Path, networks: Networks) -> str:
    try:
        start_from(path, networks)
    except UserError as error:
        return str(error)
    return ""


def changed(tensors: dict[str, Tensor], how: str, key: str, part: str) -> dict[str, Tensor]:
    layer = key.split(".lora_")[0].split(".hada_")[0].split(".lokr_")[0].split(".oft_")[0].split(".dora_")[0]
    layer = layer.removesuffix(".alpha")
    match how:
        case "nothing":
            return tensors
        case "less":
            return {name: tensor for name, tensor in tensors.items() if name != key}
        case "more":
            return tensors | {f"{layer}.{part}": torch.ones(3, 3)}
        case "whole numbers":
            return tensors | {key: tensors[key].to(torch.int32)}
        case _:
            return tensors | {"bundle_emb.ring.string_to_param.*": torch.ones(2, 4)}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    how=st.sampled_from(["nothing", "less", "more", "whole numbers", "bundle"]),
    number=st.integers(0, 99),
    part=st.sampled_from(MORE),
)
def test_what_check_accepts_is_what_a_run_can_start_from(
    attached: dict[Kind, Networks],
    tmp_path: Path,
    kind: tuple[Kind, Names],
    how: str,
    number: int,
    part: str,
) -> None:
    assume((kind[0], how) != ("oft", "less"))  # nothing would be left
    networks = attached[kind[0]]
    path = tmp_path / "a.safetensors"
    write_attached(path, networks, kind[1])
    metadata, tensors = read_header(path).metadata, load_file(path)
    key = sorted(tensors)[number % len(tensors)]
    save_file(changed(tensors, how, key, part), path, metadata)
    told, refused = start_problems(read_header(path), kind[0]), starts(path, networks)
    assert bool(told) == bool(refused), (key, part, told, refused)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sdtrain.d", "nothing"), ("sdtrain.d", '{"unet": "a"}'), ("sdtrain.alpha", "[1]"), ("sdtrain.alpha", "[" * 9999)],
)
def test_notes_that_cannot_be_read_are_told_before(
    attached: dict[Kind, Networks], tmp_path: Path, key: str, value: str
) -> None:
    path = tmp_path / "a.safetensors"
    networks = attached["lora"]
    write_attached(path, networks)
    save_file(load_file(path), path, read_header(path).metadata | {key: value})
    assert start_problems(read_header(path), "lora") and starts(path, networks)


def test_lengths_for_inputs_and_other_rotations_are_told_before(attached: dict[Kind, Networks], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    networks = attached["dora"]
    write_attached(path, networks)
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("to_q.dora_scale"))
    save_file(tensors | {key: tensors[key].T.contiguous()}, path)
    assert "for each input" in str(start_problems(read_header(path), "dora")) and "each input" in starts(path, networks)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_cayley_neumann": True}))
    peft = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{TO_Q}.oft_R.weight": torch.zeros(16, 6)}, peft)
    assert "by a series" in str(start_problems(read_header(peft), "oft")) and starts(peft, attached["oft"])
    for setting in ("coft", "block_share"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({setting: True}))
        assert f"peft's `{setting}`" in str(start_problems(read_header(peft), "oft"))
        assert f"peft's `{setting}`" in str(starts(peft, attached["oft"]))
        assert describe_file(peft).not_computed == (setting,)
    (tmp_path / "adapter_config.json").unlink()
    assert "adapter_config.json" in str(start_problems(read_header(peft), "oft"))


def test_numbers_that_are_not_finite_are_no_adapter(attached: dict[Kind, Networks], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    networks = attached["lora"]
    write_attached(path, networks)
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key][0, 0] = float("inf")
    save_file(tensors, path)
    with pytest.raises(UserError, match="numbers that are not finite: its training had diverged"):
        read_lora(path, networks)
    assert len(read_lora(path, networks, partial=True).adapters["unet"]) == 1
