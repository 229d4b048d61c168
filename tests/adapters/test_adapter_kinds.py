"""Every kind of adapter starts as nothing, computes what its definition says, and reads the same from its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, adapter_weights, attach_adapters
from sdtrain.adapters.formats.conventions import Names
from sdtrain.adapters.formats.lora_file import read_lora, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import AdapterKind, LoraWeights, OftWeights, delta, idle_networks
from sdtrain.errors import UserError

MakeNetworks = Callable[[], dict[str, nn.Module]]
KINDS: list[AdapterKind] = ["lora", "rslora", "dora", "loha", "lokr", "oft"]
FACTS = FileFacts(title="test", date="2026-11-22T15:00:00+00:00")


class Layers(nn.Module):
    """A linear layer and convolutions with and without an extent."""

    def __init__(self, extent: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(8, 12, 1)
        self.wide = nn.Conv2d(12, 8, extent, stride=2, padding=extent // 2)
        self.linear = nn.Linear(8, 24)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.linear(self.wide(self.narrow(pixels)).flatten(2).movedim(1, -1))


def layers(kind: AdapterKind, dtype: torch.dtype = torch.float32) -> Layers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Layers(1 if kind == "oft" else 3).to(dtype).requires_grad_(False)


def attach(network: nn.Module, kind: AdapterKind, rank: int = 4) -> dict[str, nn.Parameter]:
    ranks = {} if kind == "oft" else {"narrow": 2}
    settings = AdapterSettings(kind, rank, 3.0, ranks)
    return attach_adapters(network, ["narrow", "wide", "linear"], settings, torch.Generator().manual_seed(1))


def train_a_little(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


PIXELS = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_no_bit(kind: AdapterKind, dtype: torch.dtype) -> None:
    network = layers(kind, dtype)
    before = network(PIXELS.to(dtype))
    attach(network, kind)
    after = network(PIXELS.to(dtype))
    if (kind, dtype) == ("oft", torch.bfloat16):  # the rotated copy is laid out anew, and another kernel sums it up
        torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("kind", KINDS)
def test_first_values_come_from_the_generator_handed_in(kind: AdapterKind) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = attach(layers(kind), kind)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = attach(layers(kind), kind)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in first.values())


@pytest.mark.parametrize("kind", KINDS)
def test_live_adapters_compute_their_definition(kind: AdapterKind) -> None:
    network, plain = layers(kind), layers(kind)
    train_a_little(attach(network, kind))
    with torch.no_grad():
        for name, weights in adapter_weights(network).items():
            weight = plain.get_submodule(name).weight
            change = delta(weights, weight)
            assert change.norm() > 0.01 * weight.norm()
            weight.add_(change)
        torch.testing.assert_close(network(PIXELS), plain(PIXELS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_every_parameter(kind: AdapterKind) -> None:
    network = layers(kind)
    parameters = attach(network, kind)
    assert idle_networks({"unet": adapter_weights(network)}) == ["unet"]
    train_a_little(parameters)
    assert idle_networks({"unet": adapter_weights(network)}) == []
    network(PIXELS).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters.values())


def test_rank_and_alpha_go_by_pattern_and_the_last_one_counts() -> None:
    network = layers("lora")
    settings = AdapterSettings("lora", 4, 8.0, {"*i*": 2, "linear": 6}, {"wide": 1.5})
    attach_adapters(network, ["narrow", "wide", "linear"], settings, torch.Generator())
    found = {name: (weights.rank, weights.alpha) for name, weights in adapter_weights(network).items()}
    assert found == {"narrow": (4, 8.0), "wide": (2, 1.5), "linear": (6, 8.0)}


def test_a_rank_stabilised_lora_is_written_with_the_alpha_that_others_need() -> None:
    network = layers("rslora")
    attach(network, "rslora", rank=16)
    weights = adapter_weights(network)["linear"]
    assert isinstance(weights, LoraWeights)
    assert weights.alpha / weights.rank == pytest.approx(3.0 / 4)  # alpha / sqrt(rank)


def test_oft_refuses_what_it_cannot_rotate() -> None:
    with pytest.raises(UserError, match="several pixels"):
        attach(layers("lora"), "oft")
    with pytest.raises(UserError, match="mean nothing to OFT"):
        attach_adapters(layers("oft"), ["narrow"], AdapterSettings("oft", 4, alphas={"*": 1.0}), torch.Generator())
    with pytest.raises(UserError, match="8 inputs, which blocks of 5 do not divide"):
        attach(layers("oft"), "oft", rank=5)


@pytest.mark.parametrize("names", ["sd-scripts", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_the_change_or_are_refused(
    make_networks: MakeNetworks, tmp_path: Path, kind: AdapterKind, names: Names
) -> None:
    networks, bases = make_networks(), make_networks()
    modules = {
        "unet": ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in", "mid_block.resnets.0.conv1"],
        "text_encoder": ["encoder.layers.0.mlp.fc1"],
        "text_encoder_2": ["text_model.encoder.layers.1.self_attn.k_proj"],
    }
    if kind == "oft":
        modules["unet"] = modules["unet"][:1]
    ranks = {} if kind == "oft" else {"*conv*": 3}
    settings = AdapterSettings(kind, 4, 3.0, ranks, {} if kind == "oft" else {"*to_q": 1.0})
    for component, names_ in modules.items():
        train_a_little(attach_adapters(networks[component], names_, settings, torch.Generator().manual_seed(7)))
    adapters = {component: adapter_weights(network) for component, network in networks.items()}
    path = tmp_path / "a.safetensors"
    if kind == "oft" and names == "sd-scripts":
        with pytest.raises(UserError, match="no words"):
            write_lora(path, adapters, networks, names=names, facts=FACTS)
        assert not list(tmp_path.iterdir())
        return
    write_lora(path, adapters, networks, names=names, facts=FACTS)
    read = read_lora(path, bases).adapters
    for component, found in adapters.items():
        assert set(read[component]) == set(modules[component])
        for module, weights in found.items():
            base = bases[component].get_submodule(module).weight
            wanted = delta(weights, base)
            assert wanted.norm() > 0
            assert (delta(read[component][module], base) - wanted).norm() <= 1e-3 * wanted.norm()


def test_a_rotation_keeps_lengths() -> None:
    weights = OftWeights(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), 4)
    base = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((base + delta(weights, base)).norm(dim=1), base.norm(dim=1))
