"""OFT of other tools is read with the change that they compute: sd-scripts', LyCORIS' and peft's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, adapter_weights, attach_adapters
from sdtrain.adapters.formats.describe import describe_file
from sdtrain.adapters.formats.layer_names import sd_scripts_names
from sdtrain.adapters.formats.lora_file import read_lora, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import delta
from sdtrain.adapters.layers import layer_names
from sdtrain.adapters.loading.beside import put_beside
from sdtrain.adapters.loading.warm_start import start_from
from sdtrain.errors import UserError

Networks = dict[str, nn.Module]
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LAYERS = [TO_Q, "mid_block.resnets.0.conv1", "conv_in", "down_blocks.1.attentions.0.proj_out"]
FACTS = FileFacts(title="test", date="2026-11-22T15:00:00+00:00")


@pytest.fixture(scope="module")
def networks(make_networks: Callable[[], Networks]) -> Networks:
    return make_networks()


def turned(blocks: Tensor, base: Tensor, alpha: float, lengths: Tensor | None) -> Tensor:
    """The weight after the rotation, row by row and block by block: row m of a block is sum over n of R[n, m] W[n]."""
    size = blocks.shape[1]
    skews = [block - block.T for block in blocks]
    norm = sum(float(skew.square().sum()) for skew in skews) ** 0.5
    limit = alpha * base.shape[0]
    found = torch.empty_like(base)
    for number, skew in enumerate(skews):
        q = skew * limit / norm if 0 < limit < norm else skew
        rotation = (torch.eye(size) + q) @ torch.linalg.inv(torch.eye(size) - q)
        for m in range(size):
            row = sum(rotation[n, m] * base[number * size + n] for n in range(size))
            found[number * size + m] = row if lengths is None else lengths[number * size + m] * row
    return found


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.sampled_from(["lora_unet_", "oft_unet_", "lycoris_"]),
    layer=st.sampled_from(LAYERS),
    size=st.sampled_from([1, 2, 4, 16]),
    alpha=st.sampled_from([None, 0.0, 1e-3, 0.5]),
    scaled=st.booleans(),
)
def test_rotations_of_outputs_are_read(
    networks: Networks,
    tmp_path: Path,
    prefix: str,
    layer: str,
    size: int,
    alpha: float | None,
    scaled: bool,
) -> None:
    generator = torch.Generator().manual_seed(1)
    base = networks["unet"].get_submodule(layer).weight
    assert isinstance(base, Tensor)
    name = prefix + sd_scripts_names(networks)["unet"][layer].removeprefix("lora_unet_")
    if prefix == "lycoris_":
        name = prefix + layer.replace(".", "_")
    blocks = 0.3 * torch.randn(base.shape[0] // size, size, size, generator=generator)
    lengths = 1 + 0.2 * torch.randn(base.shape[0], generator=generator) if scaled else None
    parts = {"oft_blocks": blocks}
    parts |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
    parts |= {} if lengths is None else {"rescale": lengths.view(-1, *[1] * (base.dim() - 1))}
    path = tmp_path / "a.safetensors"
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, path)
    read = read_lora(path, networks)
    assert not read.left_out
    wanted = turned(blocks, base, alpha or 0.0, lengths) - base
    torch.testing.assert_close(delta(read.adapters["unet"][layer], base), wanted, rtol=1e-4, atol=1e-5)
    assert (describe_file(path).kind, dict(describe_file(path).num_modules)) == ("oft", {"unet": 1})


def test_rotations_of_text_encoders_are_read(networks: Networks, tmp_path: Path) -> None:
    module = next(name for name in layer_names(networks["text_encoder_2"]) if name.endswith("layers.1.mlp.fc1"))
    base = networks["text_encoder_2"].get_submodule(module).weight
    assert isinstance(base, Tensor)
    blocks = 0.3 * torch.randn(base.shape[0] // 4, 4, 4, generator=torch.Generator().manual_seed(1))
    name = sd_scripts_names(networks)["text_encoder_2"][module]
    save_file({f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(0.0)}, tmp_path / "a.safetensors")
    [found] = read_lora(tmp_path / "a.safetensors", networks).adapters["text_encoder_2"].values()
    torch.testing.assert_close(delta(found, base), turned(blocks, base, 0.0, None) - base, rtol=1e-4, atol=1e-5)


def rotations(networks: Networks, path: Path, *shape: int) -> Path:
    name = sd_scripts_names(networks)["unet"][TO_Q]
    save_file({f"{name}.oft_blocks": 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))}, path)
    return path


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ((2, 16, 4, 4), r"a butterfly \(BOFT\), which is not known here"),
        ((16, 4, 3), "which is no square"),
        ((8, 4, 4), r"is for a layer of shape \(32, 64\)"),
    ],
)
def test_other_rotations_are_refused(networks: Networks, tmp_path: Path, shape: tuple[int, ...], what: str) -> None:
    with pytest.raises(UserError, match=what):
        read_lora(rotations(networks, tmp_path / "a.safetensors", *shape), networks)


def test_rotations_of_outputs_are_added_to_weights_and_neither_trained_nor_written(
    make_networks: Callable[[], Networks], tmp_path: Path
) -> None:
    networks = make_networks()
    path = rotations(networks, tmp_path / "a.safetensors", 16, 4, 4)
    read = read_lora(path, networks)
    assert not put_beside(make_networks(), read.adapters), "no layer here turns outputs"
    with pytest.raises(UserError, match="no words"):
        write_lora(tmp_path / "b.safetensors", read.adapters, networks, names="diffusers", facts=FACTS)
    attach_adapters(networks["unet"], [TO_Q], AdapterSettings("oft", 4), torch.Generator())
    with pytest.raises(UserError, match="turns outputs"):
        start_from(path, networks)


@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4, 5, 7])
def test_what_peft_saves_is_read_as_peft_computes_it(
    make_networks: Callable[[], Networks], tmp_path: Path, terms: int
) -> None:
    """By default peft takes a series instead of Cayley's transform, and that of the inverse rotation."""
    from peft import OFTConfig, get_peft_model

    networks, plain = make_networks(), make_networks()
    series = {"use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or 5}
    model = get_peft_model(
        networks["unet"], OFTConfig(target_modules=[TO_Q, LAYERS[1]], r=0, oft_block_size=4, **series)
    )
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["oft_block_size"] == 4
    read = read_lora(tmp_path / "adapter_model.safetensors", plain).adapters["unet"]
    assert set(read) == {TO_Q, LAYERS[1]}
    merged = model.merge_and_unload()
    for layer, weights in read.items():
        base = plain["unet"].get_submodule(layer).weight
        wanted = merged.get_submodule(layer).weight.detach() - base
        torch.testing.assert_close(delta(weights, base), wanted, rtol=1e-4, atol=1e-5)
        assert wanted.norm() > 0.01 or terms == 1


@pytest.mark.parametrize("setting", ["block_share", "coft"])
def test_what_peft_computes_otherwise_is_refused(networks: Networks, tmp_path: Path, setting: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({setting: True}))
    save_file({f"base_model.model.{TO_Q}.oft_R.weight": torch.ones(16, 6)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"peft's `{setting}`"):
        read_lora(tmp_path / "a.safetensors", networks)


def test_a_rotation_that_was_trained_here_is_still_exact(networks: Networks, tmp_path: Path) -> None:
    copy = {"unet": networks["unet"]}
    attach_adapters(copy["unet"], [TO_Q], AdapterSettings("oft", 4), torch.Generator())
    live = adapter_weights(copy["unet"])
    write_lora(tmp_path / "a.safetensors", {"unet": live}, copy, names="diffusers", facts=FACTS)
    [found] = read_lora(tmp_path / "a.safetensors", copy).adapters["unet"].values()
    assert found.terms == 0  # type: ignore[union-attr]
