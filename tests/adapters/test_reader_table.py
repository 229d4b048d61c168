"""Who reads which file right: dW by the formula of each reader, over every kind, all layers and all three networks.

The readers' formulas are written here from what the tools are documented and observed to compute. diffusers is asked
itself. What the table of readers says must be what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from sdtrain.adapters.conversion import converted
from sdtrain.adapters.formats.layer_names import sd_scripts_names
from sdtrain.adapters.formats.lora_file import read_lora, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import (
    Adapters,
    AdapterWeights,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    delta,
)
from sdtrain.adapters.layers import plain_modules
from sdtrain.adapters.low_rank import RankRule
from sdtrain.adapters.targets import select_modules
from sdtrain.families.readers import READ_RIGHT, READERS, Kind, Naming, Reader
from tests.adapters.test_diffusers_reads_ours import pipeline

Networks = dict[str, nn.Module]
Changes = dict[tuple[str, str], Tensor]
"""(network, layer) -> dW."""
FACTS = FileFacts(title="test", date="2026-11-22T15:00:00+00:00")
RIGHT = 1e-3
"""|dW of a reader - dW| / |dW| that rounding explains; the smallest wrong formula is a hundred times as far off."""


def random_weights(kind: Kind, base: Tensor, generator: torch.Generator) -> AdapterWeights:
    """Values of about 0.3 of the base's size, so that every formula shows."""
    out, width = base.shape[0], base[0].numel()

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lora = LoraWeights(some(4, *base.shape[1:]) * 0.1, some(out, 4, *[1] * (base.dim() - 2)) * 0.1, 3.0)
    match kind:
        case "lora":
            return lora
        case "dora":
            lengths = base.flatten(1).norm(dim=1)
            return DoraWeights(lora, lengths * (1 + 0.2 * some(out)))
        case "loha":
            return LohaWeights(some(out, 4) * 0.2, some(4, width) * 0.2, some(out, 4) * 0.2, some(4, width) * 0.2, 3.0)
        case "lokr":
            return LokrWeights(some(2, 2) * 0.2, (some(out // 2, 3) * 0.2, some(3, width // 2)), 2.0)
        case "oft":
            return OftWeights(some(width // 4, 6) * 0.2, 4)
        case "diff":
            return DiffWeights(some(*base.shape) * 0.1)


def random_adapters(networks: Networks, kind: Kind) -> Adapters:
    """Adapters of one kind on all layers that can carry it; OFT and LoKr of even widths on those with one pixel."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, dict[str, AdapterWeights]] = {}
    for component, network in networks.items():
        for module in select_modules(network, "all-linear" if kind in ("oft", "lokr") else "all"):
            weight = network.get_submodule(module).weight
            assert isinstance(weight, Tensor)
            if kind in ("oft", "lokr") and (weight.shape[1] % 4 or weight.shape[0] % 2):
                continue
            found.setdefault(component, {})[module] = random_weights(kind, weight, generator)
    return found


def trained_changes(networks: Networks, adapters: Adapters) -> Changes:
    layers = {component: dict(plain_modules(network)) for component, network in networks.items()}
    return {
        (component, module): delta(weights, layers[component][module].weight)
        for component, modules in adapters.items()
        for module, weights in modules.items()
    }


def product(parts: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """dW without lengths, as every reader of sd-scripts and LyCORIS names computes it."""
    if "diff" in parts:
        return parts["diff"]
    scale = float(parts["alpha"])
    if "lora_up.weight" in parts:
        up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"].flatten(1)
        return (scale / down.shape[0]) * (up @ down).view(base.shape)
    if "hada_w1_a" in parts:
        rank = parts["hada_w1_b"].shape[0]
        left = parts["hada_w1_a"] @ parts["hada_w1_b"]
        return scale / rank * (left * (parts["hada_w2_a"] @ parts["hada_w2_b"])).view(base.shape)
    second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    return scale / parts["lokr_w2_b"].shape[0] * torch.kron(parts["lokr_w1"], second).view(base.shape)


def comfyui(parts: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """m (W + dW) / |W|, the lengths being those of the base's rows; Forge computes the same."""
    change = product(parts, base)
    if "dora_scale" not in parts:
        return change
    rows = base.flatten(1).norm(dim=1).view(-1, *[1] * (base.dim() - 1))
    return (base + change) * parts["dora_scale"] / rows - base


def a1111(parts: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """m (W + dW) / |W + dW|, the lengths being those of its columns."""
    change = product(parts, base)
    if "dora_scale" not in parts:
        return change
    merged = base + change
    columns = merged.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (base.dim() - 2))
    return merged * (parts["dora_scale"] / columns) - base


def sd_scripts(parts: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """Its `networks.lora` knows down, up and alpha, and passes over the rest."""
    if "lora_up.weight" not in parts:
        return torch.zeros_like(base)
    return product({key: tensor for key, tensor in parts.items() if key != "dora_scale"}, base)


FORMULAS: dict[Reader, Callable[[Mapping[str, Tensor], Tensor], Tensor]] = {
    "ComfyUI": comfyui,
    "Forge": comfyui,
    "A1111": a1111,
    "sd-scripts": sd_scripts,
}


def read_by(reader: Reader, path: Path, networks: Networks, names: Naming) -> Changes:
    """dW of each layer as a reader computes it; layers that it does not find are missing."""
    if reader == "diffusers":
        return read_by_diffusers(path, networks)
    if names == "diffusers":
        return {}  # ComfyUI finds a part of the layers, the others none: see sdtrain/families/readers.py
    tensors = load_file(path)
    found: Changes = {}
    for component, modules in sd_scripts_names(networks).items():
        for module, name in modules.items():
            parts = {key.split(".", 1)[1]: tensor for key, tensor in tensors.items() if key.split(".")[0] == name}
            if parts:
                base = dict(plain_modules(networks[component]))[module].weight
                found[component, module] = FORMULAS[reader](parts, base)
    return found


def read_by_diffusers(path: Path, networks: Networks) -> Changes:
    before = {
        (component, name): parameter.detach().clone()
        for component, network in networks.items()
        for name, parameter in network.named_parameters()
    }
    pipe = pipeline(networks)
    try:
        pipe.load_lora_weights(path)
        pipe.fuse_lora(components=list(networks))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError):
        return {}
    return {
        (component, name): module.weight.detach() - before[component, f"{name}.weight"]
        for component, network in networks.items()
        for name, module in plain_modules(network)
        if (component, f"{name}.weight") in before
    }


def is_right(read: Changes, wanted: Changes) -> bool:
    lost = sum(float((read.get(layer, torch.zeros(())) - change).square().sum()) for layer, change in wanted.items())
    return lost <= RIGHT**2 * sum(float(change.square().sum()) for change in wanted.values())


def who_reads(path: Path, make_networks: Callable[[], Networks], names: Naming, wanted: Changes) -> set[Reader]:
    with torch.no_grad():
        return {reader for reader in READERS if is_right(read_by(reader, path, make_networks(), names), wanted)}


@pytest.mark.parametrize(("kind", "names"), READ_RIGHT)
def test_the_table_of_readers_is_what_their_formulas_say(
    make_networks: Callable[[], Networks], tmp_path: Path, kind: Kind, names: Naming
) -> None:
    networks, path = make_networks(), tmp_path / "a.safetensors"
    adapters = random_adapters(networks, kind)
    wanted = trained_changes(networks, adapters)
    write_lora(path, adapters, networks, names=names, facts=FACTS)
    assert who_reads(path, make_networks, names, wanted) == READ_RIGHT[kind, names]
    again = read_lora(path, networks).adapters
    assert is_right(trained_changes(networks, again), wanted), "sdtrain reads all that it writes"


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft"])
def test_as_a_lora_every_reader_computes_what_was_trained(
    make_networks: Callable[[], Networks], tmp_path: Path, kind: Kind
) -> None:
    networks, path = make_networks(), tmp_path / "a.safetensors"
    adapters = random_adapters(networks, kind)
    found = converted(adapters, networks, "lora", RankRule(10_000))
    assert found.error < RIGHT
    write_lora(path, found.adapters, networks, names="sd-scripts", facts=FACTS)
    assert who_reads(path, make_networks, "sd-scripts", trained_changes(networks, adapters)) == set(READERS)


@pytest.mark.parametrize("kind", ["lora", "dora", "oft"])
def test_the_whole_change_is_exact(make_networks: Callable[[], Networks], tmp_path: Path, kind: Kind) -> None:
    networks, path = make_networks(), tmp_path / "a.safetensors"
    adapters = random_adapters(networks, kind)
    found = converted(adapters, networks, "diff", RankRule(1))
    assert found.error == 0
    write_lora(path, found.adapters, networks, names="sd-scripts", facts=FACTS)
    wanted = trained_changes(networks, adapters)
    assert who_reads(path, make_networks, "sd-scripts", wanted) == READ_RIGHT["diff", "sd-scripts"]


@settings(max_examples=15, deadline=None)
@given(rank=st.integers(1, 12), energy=st.floats(0.3, 1.0), seed=st.integers(0, 99))
def test_the_error_that_is_told_is_what_is_lost(rank: int, energy: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Sequential(nn.Linear(12, 16), nn.Conv2d(8, 12, 3)).requires_grad_(False)
    weights = {name: random_weights("dora", layer[int(name)].weight, generator) for name in "01"}
    found = converted({"unet": weights}, {"unet": layer}, "lora", RankRule(rank, energy))
    kept = trained_changes({"unet": layer}, found.adapters)
    wanted = trained_changes({"unet": layer}, {"unet": weights})
    lost = sum(float((kept[key] - wanted[key]).square().sum()) for key in wanted)
    total = sum(float(change.square().sum()) for change in wanted.values())
    assert found.error == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-5)
    assert all(weights.rank <= rank for weights in found.adapters["unet"].values())
    if rank == 12 and energy == 1.0:
        assert found.error < RIGHT
    limit = (1 - energy) ** 0.5
    assert found.error <= limit + 1e-3 or any(weights.rank == rank for weights in found.adapters["unet"].values())
