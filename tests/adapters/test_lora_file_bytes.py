"""The bytes of adapter files are fixed: web interfaces know a file by its hashes, which no update may change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sdtrain.adapters.formats.conventions import Names
from sdtrain.adapters.formats.lora_file import write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import Adapters, LoraWeights
from sdtrain.adapters.targets import select_modules

FACTS = FileFacts(
    title="cats",
    date="2026-11-22T15:00:00Z",
    resolution_px=(1024, 768),
    steps=1200,
    tag_counts={"10_cat": {"grün": 3}},
    config_toml='name = "cats"\n',
    d={"unet": 1.25e-4},
)
DIGESTS: dict[tuple[Names, torch.dtype], str] = {
    ("sd-scripts", torch.float32): "21266c4d6d107bf16b8c6d5df127e200dcfff2307ba73c907fe41c81f23ea007",
    ("sd-scripts", torch.float16): "366b8706d102fe6aaf2e54a3e6430351851d2713b682d2cb022a4b0b76dbb3a4",
    ("sd-scripts", torch.bfloat16): "8242e23d75f7509fb83bfe6883440f6d5b1bedacf4684096bbd14640cae097f2",
    ("diffusers", torch.float32): "9cb56ba6f9220b85a04b7beaaa04c95800579d0d398e12494039edb72af4d3a4",
    ("diffusers", torch.float16): "67f07e8ce2ace3cde79223a937727d19e4328569161f4d86bf6cf48d0278caa3",
    ("diffusers", torch.bfloat16): "a813c4b07a1d0386dda08104da81b9c8d6aa88a6d90ece1479efac1292893911",
}


def numbers(*shape: int) -> Tensor:
    """Values that are the same on every machine and exact in every type."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 % 61 - 30) / 32).reshape(shape)


def some_lora(networks: dict[str, nn.Module], dtype: torch.dtype) -> Adapters:
    found: dict[str, dict[str, LoraWeights]] = {}
    for component, network in networks.items():
        for index, module in enumerate(select_modules(network, "attention")[:6]):
            weight = network.get_submodule(module).weight
            assert isinstance(weight, Tensor)
            rank, alpha = [(4, 2.0), (3, 2.5)][index % 2]
            down, up = numbers(rank, weight.shape[1]).to(dtype), numbers(weight.shape[0], rank).to(dtype)
            found.setdefault(component, {})[module] = LoraWeights(down, up, alpha)
    return found


@pytest.mark.parametrize(("names", "dtype"), DIGESTS)
def test_a_lora_file_has_the_bytes_it_always_had(
    make_networks: Callable[[], dict[str, nn.Module]], tmp_path: Path, names: Names, dtype: torch.dtype
) -> None:
    networks, path = make_networks(), tmp_path / "cats.safetensors"
    write_lora(path, some_lora(networks, dtype), networks, names=names, facts=FACTS)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == DIGESTS[names, dtype]
