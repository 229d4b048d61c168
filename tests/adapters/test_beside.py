"""Laws of a file's adapters beside the weights of a model."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from sdtrain.adapters.attach import live_layers
from sdtrain.adapters.kinds import AdapterWeights, DiffWeights, DoraWeights, LoraWeights, delta
from sdtrain.adapters.loading.beside import put_beside

WIDTH = 8


class Two(nn.Module):
    """Two layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (n, width) of (n, width)."""
        outputs: Tensor = self.second(self.first(inputs).tanh())
        return outputs


def low_rank(rank: int, alpha: float, seed: int) -> LoraWeights:
    generator = Generator().manual_seed(seed)
    down, up = torch.randn(rank, WIDTH, generator=generator), torch.randn(WIDTH, rank, generator=generator)
    return LoraWeights(down, up, alpha)


def changed(network: Two, adapters: dict[str, AdapterWeights], inputs: Tensor) -> Tensor:
    """What the layers give with their dW added, by its definition."""
    layers = {"first": network.first, "second": network.second}
    with torch.no_grad():
        whole = {name: layer.weight + delta(adapters[name], layer.weight) for name, layer in layers.items()}
        hidden = nn.functional.linear(inputs, whole["first"], network.first.bias).tanh()
        return nn.functional.linear(hidden, whole["second"], network.second.bias)


def test_layers_of_several_ranks_and_alphas_compute_what_their_change_means() -> None:
    network, inputs = Two(), torch.randn(5, WIDTH)
    adapters: dict[str, AdapterWeights] = {"first": low_rank(2, 4.0, 0), "second": low_rank(3, 1.5, 1)}
    expected = changed(network, adapters, inputs)
    assert put_beside({"unet": network, "text_encoder": Two()}, {"unet": adapters})
    assert torch.allclose(network(inputs), expected, atol=1e-5)
    assert len(list(live_layers(network))) == 2


def test_what_cannot_stand_beside_leaves_all_networks_as_they_were() -> None:
    """Kinds that differ within a network, and a second network that fails when the first is done."""
    one, other, inputs = Two(), Two(), torch.randn(5, WIDTH)
    before = one(inputs), other(inputs)
    lora = low_rank(2, 4.0, 0)
    change = DiffWeights(torch.ones(WIDTH, WIDTH))
    on_inputs = DoraWeights(lora, torch.ones(WIDTH), on_inputs=True)
    for wrong in ({"first": lora, "second": change}, {"first": on_inputs}):
        adapters: dict[str, dict[str, AdapterWeights]] = {"unet": {"first": lora}, "text_encoder": wrong}
        assert not put_beside({"unet": one, "text_encoder": other}, adapters)
        assert not list(live_layers(one)) and not list(live_layers(other))
        assert torch.equal(one(inputs), before[0]) and torch.equal(other(inputs), before[1])
