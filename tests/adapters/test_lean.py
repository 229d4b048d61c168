"""Our forward and backward of adapters against peft's: the same numbers, and nothing kept that was not kept before."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, attach_adapters
from sdtrain.adapters.kinds import AdapterKind
from sdtrain.adapters.lean import dora
from sdtrain.adapters.lean.layers import make_plain

KINDS: list[AdapterKind] = ["lora", "rslora", "dora", "loha", "lokr"]
PIECES = [(8, 2), (64, 4), (2**20, 64)]
"""Numbers of a weight that are computed at once, and of how many rows a piece has a multiple."""
LINEARS = st.fixed_dictionaries(
    {
        "in_features": st.integers(1, 24),
        "out_features": st.integers(1, 24),
        "bias": st.booleans(),
    }
)
CONVOLUTIONS = st.fixed_dictionaries(
    {
        "in_channels": st.integers(1, 12),
        "out_channels": st.integers(1, 12),
        "kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
        "bias": st.booleans(),
    }
)
LINEAR = {"in_features": 48, "out_features": 40, "bias": True}
CONVOLUTION = {"in_channels": 24, "out_channels": 20, "kernel_size": 3, "stride": 2, "padding": 1, "bias": True}


def adapted(layer: nn.Module, kind: AdapterKind, rank: int = 4, alpha: float = 3.0) -> nn.Sequential:
    """A layer with an adapter that has moved far from where it began."""
    network = nn.Sequential(layer).requires_grad_(False).eval()
    generator = Generator().manual_seed(1)
    parameters = attach_adapters(network, ["0"], AdapterSettings(kind, rank, alpha), generator)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def layer_of(sizes: dict[str, Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (nn.Linear(**sizes) if "in_features" in sizes else nn.Conv2d(**sizes)).to(dtype)


def inputs_of(layer: nn.Module, num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (num, 3, layer.in_features) if isinstance(layer, nn.Linear) else (num, layer.in_channels, 9, 8)
    return torch.randn(shape, generator=Generator().manual_seed(2)).to(dtype).requires_grad_()


def results(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a loss that weighs every number of it differently."""
    network.zero_grad()
    inputs.grad = None
    output: Tensor = network(inputs)
    weights = torch.randn(output.shape, generator=Generator().manual_seed(3)).to(output.dtype)
    (output * weights).sum().backward()
    gradients = {name: each.grad for name, each in network.named_parameters() if each.requires_grad}
    found = {"output": output.detach(), "inputs": inputs.grad, **gradients}
    assert all(tensor is not None for tensor in found.values())
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def both(network: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What we compute, and what peft does."""
    plain = copy.deepcopy(network)
    make_plain(plain)
    assert not any(type(module).__name__.startswith("Lean") for module in plain.modules())
    assert any(type(module).__name__.startswith("Lean") for module in network.modules())
    return results(network, inputs), results(plain, inputs)


def require_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the length of each tensor, so that one of zeros is one of zeros."""
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype and ours[name].shape == wanted.shape, name
        error = (ours[name].double() - wanted.double()).norm()
        assert error <= tolerance * wanted.double().norm(), f"{name}: {error / wanted.double().norm():.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", [LINEARS, CONVOLUTIONS], ids=["linear", "convolution"])
def test_outputs_and_gradients_are_those_of_peft(kind: AdapterKind, shapes: st.SearchStrategy[dict[str, Any]]) -> None:
    @given(shapes, st.integers(1, 3), st.integers(1, 6), st.integers(1, 24), st.sampled_from(PIECES))
    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    def check(sizes: dict[str, Any], num: int, rank: int, eighths: int, piece: tuple[int, int]) -> None:
        if kind not in ("loha", "lokr") and "dilation" in sizes:
            sizes["dilation"] = 1  # peft forgets it in the down convolution of a LoRA
        layer = layer_of(sizes)
        network = adapted(layer, kind, rank, rank * eighths / 8).double()  # peft rounds LoHa's scale to float32
        with patch.object(dora, "PIECE", piece[0]), patch.object(dora, "ALIGNED", piece[1]):
            require_equal(*both(network, inputs_of(layer, num)), tolerance=1e-10)

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
def test_float32_differs_from_peft_by_its_rounding(kind: AdapterKind, sizes: dict[str, Any]) -> None:
    layer = layer_of(sizes, torch.float32)
    require_equal(*both(adapted(layer, kind), inputs_of(layer, 4, torch.float32)), tolerance=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
def test_bfloat16_differs_from_the_truth_by_the_rounding_of_products(kind: AdapterKind, sizes: dict[str, Any]) -> None:
    """2^-9 is the most that one number is moved by being rounded; two factors and a product are rounded in a row."""
    layer = layer_of(sizes, torch.bfloat16)
    network = adapted(layer, kind)
    inputs = inputs_of(layer, 4, torch.bfloat16)
    ours = results(network, inputs)
    exact = copy.deepcopy(network).double()
    make_plain(exact)
    truth = results(exact, inputs.detach().double().requires_grad_())
    assert all(each.dtype == torch.float32 for name, each in ours.items() if name.startswith("0"))
    for name, wanted in truth.items():
        error = (ours[name].double() - wanted).norm() / wanted.norm()
        assert error < 3 * 2**-9, f"{name}: {error * 2**9:.2f} x 2^-9"


@given(st.integers(1, 20_000), st.integers(1, 2**24))
@settings(deadline=None, derandomize=True, database=None)
def test_pieces_are_all_rows_once_begin_where_cards_are_fast_and_are_never_one_row(num: int, width: int) -> None:
    found = list(dora.pieces_of(num, width))
    assert [row for piece in found for row in range(piece.start, piece.stop)] == list(range(num))
    assert all(piece.start % 64 == 0 for piece in found)
    assert all(piece.stop - piece.start > 1 for piece in found) or num == 1
    assert all((piece.stop - piece.start) * width <= max(dora.PIECE, 64 * width) + width for piece in found)
