"""What is left out follows from the generator alone, the mean is right, and outside of `drawn` nothing is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, attach_adapters, live_layers
from sdtrain.adapters.dropout import AdapterDropout, DropoutRates
from sdtrain.adapters.kinds import AdapterKind


class Layers(nn.Module):
    """A convolution, a linear layer over tokens, and one over vectors, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, 12, 3, padding=1)
        self.tokens = nn.Linear(8, 24)
        self.vectors = nn.Linear(8, 16)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = pixels.flatten(2).movedim(1, -1)
        return self.convolution(pixels), self.tokens(tokens), self.vectors(tokens[:, 0])


PIXELS = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(3))
ROWS = [(0, 0), (0, 1), (0, 2)]
NAMES = ["convolution", "tokens", "vectors"]
Attach = Callable[..., tuple[Layers, AdapterDropout]]


def attached(rates: DropoutRates, kind: AdapterKind = "lora") -> tuple[Layers, AdapterDropout]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Layers().requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    parameters = attach_adapters(network, NAMES, AdapterSettings(kind, 4, 8.0), generator)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network, AdapterDropout([network], rates)


def seeded(seed: int) -> Callable[[int], torch.Generator]:
    return lambda index: torch.Generator().manual_seed(1000 * seed + index)


def outputs(network: Layers, dropout: AdapterDropout, seed: int) -> tuple[Tensor, ...]:
    with torch.no_grad(), dropout.drawn(seeded(seed), ROWS):
        found: tuple[Tensor, ...] = network(PIXELS)
    return found


CASES = [
    *[(DropoutRates(neurons=0.4), kind) for kind in ("lora", "rslora")],
    (DropoutRates(ranks=0.4), "lora"),
    (DropoutRates(neurons=0.2, ranks=0.2, modules=0.2), "lora"),
    *[(DropoutRates(modules=0.4), kind) for kind in ("lora", "loha", "lokr")],
]


@pytest.mark.parametrize(("rates", "kind"), CASES)
def test_the_mean_over_draws_is_the_adapter(rates: DropoutRates, kind: AdapterKind) -> None:
    network, dropout = attached(rates, kind)
    with torch.no_grad():
        whole = network(PIXELS)
    draws = [outputs(network, dropout, seed) for seed in range(400)]
    for index, wanted in enumerate(whole):
        stacked = torch.stack([draw[index] for draw in draws])
        error = (stacked.mean(0) - wanted).norm() / (stacked - wanted).square().sum((1, 2)).mean(0).sum().sqrt()
        assert error < 0.12, "the mean of 400 draws is 20 times as near as a draw"
        assert not torch.equal(draws[0][index], draws[1][index]) or rates.modules


@pytest.mark.parametrize(("rates", "kind"), CASES)
def test_the_same_generator_drops_the_same_and_the_global_one_is_left_alone(
    rates: DropoutRates, kind: AdapterKind
) -> None:
    network, dropout = attached(rates, kind)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = outputs(network, dropout, 7)
    outputs(network, dropout, 8)
    assert all(torch.equal(one, other) for one, other in zip(first, outputs(network, dropout, 7), strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("rates", "kind"), CASES)
def test_nothing_is_dropped_outside_nor_after_an_error(rates: DropoutRates, kind: AdapterKind) -> None:
    network, dropout = attached(rates, kind)
    plain, _ = attached(DropoutRates(), kind)
    scales = [layer.scaling["default"] for layer in live_layers(network)]  # type: ignore[index, operator]
    with pytest.raises(ZeroDivisionError), dropout.drawn(seeded(0), ROWS):
        raise ZeroDivisionError
    assert scales == [layer.scaling["default"] for layer in live_layers(network)]  # type: ignore[index, operator]
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(network(PIXELS), plain(PIXELS), strict=True))


def watched(network: Layers) -> dict[str, Tensor]:
    """What the down matrices give, by layer, after what is left out."""
    hidden: dict[str, Tensor] = {}
    for name in NAMES:
        down = network.get_submodule(name).lora_A["default"]  # type: ignore[index, union-attr]
        down.register_forward_hook(lambda _, __, output, name=name: hidden.update({name: output}))
    return hidden


def test_ranks_are_dropped_whole_for_a_picture_and_neurons_one_by_one() -> None:
    """Seen from the down matrix: which of its numbers are exactly 0."""
    for rates, alike in ((DropoutRates(ranks=0.5), True), (DropoutRates(neurons=0.5), False)):
        network, dropout = attached(rates)
        hidden = watched(network)
        outputs(network, dropout, 1)
        zeros = hidden["convolution"].flatten(2) == 0
        assert zeros.any() and not zeros.all()
        assert bool((zeros.all(2) == zeros.any(2)).all()) == alike, "(n, rank, pixels)"
        zeros = hidden["tokens"] == 0
        assert bool((zeros.all(1) == zeros.any(1)).all()) == alike, "(n, tokens, rank)"
        if alike:
            assert not torch.equal(zeros[0, 0], zeros[1, 0]) or not torch.equal(zeros[0, 0], zeros[2, 0])


def test_a_module_that_is_left_out_gets_gradients_of_zero_and_the_others_larger_ones() -> None:
    network, dropout = attached(DropoutRates(modules=0.5))
    plain, _ = attached(DropoutRates())
    sum(output.sum() for output in plain(PIXELS)).backward()  # type: ignore[union-attr]
    with dropout.drawn(seeded(0), ROWS):
        sum(output.sum() for output in network(PIXELS)).backward()  # type: ignore[union-attr]
    ratios = set()
    for name in NAMES:
        wanted = plain.get_submodule(name).lora_A["default"].weight.grad  # type: ignore[index, union-attr]
        found = network.get_submodule(name).lora_A["default"].weight.grad  # type: ignore[index, union-attr]
        ratio = round(float((found / wanted).mean()), 4)
        torch.testing.assert_close(found, wanted * ratio)
        ratios.add(ratio)
    assert ratios == {0.0, 2.0}, "three layers of which seed 0 leaves out some"


@pytest.mark.parametrize(("rates", "kind"), CASES)
def test_a_picture_meets_the_same_masks_however_many_are_computed_at_once(
    rates: DropoutRates, kind: AdapterKind
) -> None:
    network, dropout = attached(rates, kind)
    whole = outputs(network, dropout, 7)
    for taken in ([0], [1, 2], [2]):
        with torch.no_grad(), dropout.drawn(seeded(7), [ROWS[number] for number in taken]):
            found = network(PIXELS[taken])
        for some, all_of_them in zip(found, whole, strict=True):
            assert torch.allclose(some, all_of_them[taken], atol=1e-5)


def test_rows_of_other_planned_micro_batches_meet_other_masks() -> None:
    network, dropout = attached(DropoutRates(neurons=0.4))
    same = PIXELS[:1].expand(4, -1, -1, -1)
    with torch.no_grad(), dropout.drawn(seeded(7), [(0, 0), (0, 1), (1, 0), (1, 1)]):
        found = network(same)[1]
    assert all(not torch.equal(found[one], found[other]) for one in range(4) for other in range(one))


@pytest.mark.parametrize("num", [6, 2])
def test_texts_in_chunks_or_fewer_than_pictures_are_dropped_row_by_row(num: int) -> None:
    network, dropout = attached(DropoutRates(neurons=0.4))
    same = PIXELS[:1].expand(num, -1, -1, -1)
    with torch.no_grad(), dropout.drawn(seeded(7), ROWS):
        found = network(same)[1]
    assert all(not torch.equal(found[one], found[other]) for one in range(num) for other in range(one))
