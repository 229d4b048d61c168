"""The limit on the norm of a layer's change holds for the weights in training and for their average."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree, averaged
from sdtrain.adapters.attach import AdapterSettings, attach_adapters
from sdtrain.adapters.kinds import AdapterKind
from sdtrain.adapters.norms import change_norms, limited_layers
from sdtrain.training.parameters import NormLimit

NAMES = ["0", "1"]


class Trained:
    """Two layers with adapters, whose outputs are pulled towards numbers that are far away for the first layer only."""

    def __init__(self, kind: AdapterKind) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(8, 12), nn.Linear(8, 12)).requires_grad_(False)
        parameters = attach_adapters(network, NAMES, AdapterSettings(kind, 2, 2.0), generator)
        self.network = network
        self.parameters = list(parameters.values())
        self.optimizer = ProdigyPlusScheduleFree(self.parameters, d0=5e-2, prodigy_steps=1)
        self.layers = tuple(limited_layers(network, parameters))
        self.inputs = torch.randn(64, 8, generator=generator)

    def steps(self, num: int) -> Iterator[int]:
        for step in range(num):
            far, near = (layer(self.inputs) for layer in self.network)
            ((far - 9).square().mean() + 1e-6 * near.square().mean()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            yield step

    def norms(self) -> tuple[Tensor, Tensor]:
        """|dW| of the averaged weights and of those in training, by layer."""
        with averaged(self.optimizer):
            shipped = change_norms(self.layers)
        return shipped, change_norms(self.layers)

    def iterates(self) -> list[Tensor]:
        fast = [self.optimizer.state[parameter]["z"] for parameter in self.parameters]
        return [tensor.detach().clone() for tensor in (*self.parameters, *fast)]


@pytest.mark.parametrize("kind", ["lora", "rslora", "loha", "lokr"])
def test_both_iterates_keep_the_limit_at_every_step_and_need_it(kind: AdapterKind) -> None:
    free, held = Trained(kind), Trained(kind)
    limit = NormLimit(0.2, held.layers)
    for _ in free.steps(30):
        pass
    assert all(float(norms[0]) > 0.4 for norms in free.norms())
    for _ in held.steps(30):
        limit.keep(held.optimizer)
        assert all(float(norms.max()) <= 0.2 * 1.0001 for norms in held.norms())
    assert max(float(norms[0]) for norms in held.norms()) > 0.18


def test_the_average_is_scaled_with_what_it_is_the_average_of() -> None:
    held = Trained("lora")
    limit = NormLimit(0.2, held.layers)
    for _ in held.steps(6):
        pass
    with averaged(held.optimizer):
        before = [parameter.detach().clone() for parameter in held.parameters]
    norms = torch.maximum(*held.norms())
    limit.keep(held.optimizer)
    with averaged(held.optimizer):
        after = [parameter.detach().clone() for parameter in held.parameters]
    for layer, norm in zip(held.layers, norms, strict=True):
        share = min(1.0, 0.2 / float(norm)) ** 0.5
        for parameter in layer.parameters:
            index = next(place for place, one in enumerate(held.parameters) if one is parameter)
            torch.testing.assert_close(after[index], before[index] * share, rtol=1e-4, atol=1e-6)


def test_a_limit_that_is_kept_changes_no_bit() -> None:
    """So a step that changed nothing, its loss not being finite, goes on changing nothing."""
    held = Trained("lora")
    for _ in held.steps(6):
        NormLimit(0.2, held.layers).keep(held.optimizer)
    before = held.iterates()
    NormLimit(0.2, held.layers).keep(held.optimizer)
    assert all(torch.equal(one, other) for one, other in zip(before, held.iterates(), strict=True))
    NormLimit(50.0, held.layers).keep(held.optimizer)
    assert all(torch.equal(one, other) for one, other in zip(before, held.iterates(), strict=True))
