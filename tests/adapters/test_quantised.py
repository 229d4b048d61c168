"""A packed base: what is packed is near, what is computed is the product with it, and nothing of it is kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, adapter_weights, attach_adapters
from sdtrain.adapters.base import without_adapters
from sdtrain.adapters.kinds import AdapterKind, DoraWeights
from sdtrain.adapters.lean.layers import make_plain
from sdtrain.adapters.quantised.layer import QuantisedLinear, base_bytes, original_weight, quantise
from sdtrain.adapters.quantised.packing import BLOCK, Packing, packed, packed_bytes, packed_shapes
from sdtrain.adapters.targets import select_modules
from tests.adapters.test_lean_networks import gradients, kept, noise, require_near, run

MakeNetworks = Callable[[], dict[str, nn.Module]]
PACKINGS: tuple[Packing, ...] = get_args(Packing)
PAIRS: list[tuple[AdapterKind, Packing]] = [
    *(("lora", "int8"), ("lora", "fp8"), ("lora", "nf4")),
    *(("dora", "fp8"), ("loha", "int8"), ("lokr", "fp8"), ("oft", "nf4")),
]
QUANTILES = (  # of arXiv 2305.14314, appendix E
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0),
)
SHAPES = st.tuples(st.integers(1, 80), st.integers(2, 200))


def packed_unet(make_networks: MakeNetworks, packing: Packing) -> tuple[nn.Module, nn.Module]:
    """A network with packed layers, and one that holds just the weights that those stand for."""
    network, plain = make_networks()["unet"], make_networks()["unet"]
    before = dict(make_networks()["unet"].named_parameters())
    quantise(network, packing, torch.device("cpu"), lambda name: before[name].detach())
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, QuantisedLinear):
                plain.get_submodule(name).weight.copy_(layer.weight)  # type: ignore[operator]
    return network, plain


def attached(network: nn.Module, kind: AdapterKind, *, moved: bool = True) -> None:
    names = select_modules(network, "all-linear")
    size = 8 if kind == "oft" else 2
    parameters = attach_adapters(network, names, AdapterSettings(kind, size, 2.0), Generator().manual_seed(4))
    with torch.no_grad():
        for index, parameter in enumerate(parameters.values()):
            parameter.add_(noise(*parameter.shape, seed=index) * 0.1 * moved)


@settings(max_examples=10, deadline=None)
@given(shape=SHAPES, scale=st.sampled_from([1e-3, 0.05, 7.0]))
def test_packed_weights_are_rounded_to_the_nearest(shape: tuple[int, int], scale: float) -> None:
    weight = noise(*shape, seed=shape[0]) * scale
    largest = weight.abs().amax(1, keepdim=True)
    steps = {"int8": largest / 127 / 2, "fp8": (weight.abs() * 2**-4).maximum(largest / 448 * 2**-10)}
    for packing in ("int8", "fp8"):
        found = packed(weight, packing).unpacked(torch.float32)  # type: ignore[arg-type]
        assert ((found - weight).abs() <= steps[packing] * 1.01).all(), packing


@settings(max_examples=10, deadline=None)
@given(shape=SHAPES)
@example(shape=(96, 160))  # whose rows end within a block
@pytest.mark.slow
def test_four_bits_mean_quantiles_times_the_largest_of_their_block(shape: tuple[int, int]) -> None:
    weight = noise(*shape, seed=shape[1])
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    places = ((blocks / scales.clamp(min=1e-30))[..., None] - torch.tensor(QUANTILES)).abs().argmin(-1)
    wanted = (torch.tensor(QUANTILES)[places] * scales).flatten()[: weight.numel()].view(shape)
    found = packed(weight, "nf4").unpacked(torch.float32)
    near = (found - wanted).abs() <= 1e-5 * weight.abs().max()
    assert near.float().mean() > 0.99  # a number in the middle between two may go either way
    assert (found - weight).norm() <= 1.01 * (wanted - weight).norm() + 1e-6


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_is_rounded_to_the_type_of_the_activations_once(packing: Packing, dtype: torch.dtype) -> None:
    packed_weight = packed(noise(24, 96), packing)
    exact = packed_weight.unpacked(torch.float32)
    found = packed_weight.unpacked(dtype)
    assert found.dtype == dtype
    roundings = 2 if packing == "nf4" else 1  # bitsandbytes rounds its table to the type, too
    assert ((found.float() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 * roundings).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_outputs_without_weights_stay_so(packing: Packing) -> None:
    weight = noise(4, 128)
    weight[1] = 0
    found = packed(weight, packing).unpacked(torch.float32)
    assert found.isfinite().all() and not found[1].any()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (96, 160)])
def test_the_bytes_are_as_the_formula_says(packing: Packing, shape: tuple[int, int]) -> None:
    for found in (packed(noise(*shape), packing), packed_shapes(noise(*shape), packing)):
        real = sum(tensor.numel() * tensor.element_size() for tensor in (found.values, found.scales))
        assert real == packed_bytes(torch.Size(shape), packing)
    real_one, planned = packed(noise(*shape), packing), packed_shapes(noise(*shape), packing)
    for one, other in ((real_one.values, planned.values), (real_one.scales, planned.scales)):
        assert one.shape == other.shape and one.dtype == other.dtype


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_network_is_as_large_as_was_said(make_networks: MakeNetworks, packing: Packing) -> None:
    unet = make_networks()["unet"]
    said, before = base_bytes(unet, packing), base_bytes(unet, None)
    network, _ = packed_unet(make_networks, packing)
    assert base_bytes(network, None) == said < before


def test_layers_that_tell_the_timestep_and_the_size_stay_as_they_are(make_networks: MakeNetworks) -> None:
    network, _ = packed_unet(make_networks, "int8")
    kept_linear = {name for name, layer in network.named_modules() if type(layer) is nn.Linear}
    assert kept_linear and all("time" in name or "add_embedding" in name for name in kept_linear)
    assert all("attentions" in name for name, layer in network.named_modules() if isinstance(layer, QuantisedLinear))


def test_four_bits_keep_the_layers_that_count_most_in_eight(make_networks: MakeNetworks) -> None:
    network, _ = packed_unet(make_networks, "nf4")
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantisedLinear)}
    in_eight = {re.sub(r".*attentions\.\d+\.(transformer_blocks\.\d+\.)?", "", name)
                for name, one in layers.items() if one.packing == "int8"}  # fmt: skip
    assert in_eight == {"proj_in", "proj_out", "attn2.to_v", "attn2.to_out.0"}
    assert {one.packing for one in layers.values()} == {"int8", "nf4"}
    network, _ = packed_unet(make_networks, "fp8")
    assert {one.packing for one in network.modules() if isinstance(one, QuantisedLinear)} == {"fp8"}


@pytest.mark.parametrize(("kind", "packing"), PAIRS)
def test_a_packed_base_computes_what_the_unpacked_weights_compute(
    make_networks: MakeNetworks, kind: AdapterKind, packing: Packing
) -> None:
    """Peft's own forward on ordinary layers is the plain twin; what differs is the order of float32 sums."""
    network, plain = packed_unet(make_networks, packing)
    for each in (network, plain):
        attached(each, kind)
    if kind == "dora":  # whose lengths are those of the original, which the twin does not have
        for name, weights in adapter_weights(plain).items():
            there = adapter_weights(network)[name]
            assert isinstance(weights, DoraWeights) and isinstance(there, DoraWeights)
            weights.magnitude.copy_(there.magnitude)
    make_plain(plain)
    ours, theirs = run(network), run(plain)
    assert torch.allclose(ours, theirs, rtol=1e-4)
    require_near(gradients(network, ours), gradients(plain, theirs), 1e-3)


@pytest.mark.parametrize(("kind", "packing"), PAIRS[:-1])
def test_no_unpacked_weight_is_kept_for_backward(
    make_networks: MakeNetworks, kind: AdapterKind, packing: Packing
) -> None:
    network, plain = packed_unet(make_networks, packing)
    assert kept(network, torch.float32) <= kept(plain, torch.float32)
    for each in (network, plain):
        attached(each, kind)
    assert kept(network, torch.float32) <= kept(plain, torch.float32)


@pytest.mark.parametrize("packing", PACKINGS)
def test_lengths_of_dora_are_those_of_the_weights_before_they_were_packed(
    make_networks: MakeNetworks, packing: Packing
) -> None:
    network, _ = packed_unet(make_networks, packing)
    attached(network, "dora", moved=False)
    before, seen = make_networks()["unet"], 0
    for name, weights in adapter_weights(network).items():
        assert isinstance(weights, DoraWeights)
        original = before.get_submodule(name).weight
        assert isinstance(original, Tensor)
        assert torch.equal(weights.magnitude, torch.linalg.norm(original, dim=1))
        base = network.get_submodule(name).get_submodule("base_layer")
        if isinstance(base, QuantisedLinear):
            assert torch.equal(original_weight(base), original) and not torch.equal(base.weight, original)
            seen += 1
    assert seen


@pytest.mark.parametrize("packing", PACKINGS)
def test_without_adapters_the_packed_base_answers(make_networks: MakeNetworks, packing: Packing) -> None:
    network, _ = packed_unet(make_networks, packing)
    before = run(network)
    attached(network, "lora")
    assert not torch.equal(run(network), before)
    with without_adapters([network]):
        assert torch.equal(run(network), before)
