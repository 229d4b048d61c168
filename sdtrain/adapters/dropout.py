"""Dropout of adapters: while a loss is computed, parts of them are left out at random and the rest counts for more.

The masks follow from a generator that is handed in, never from the global one, so that a run that goes on draws what it
would have drawn. The mean over all draws is the adapter itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sdtrain.adapters.attach import live_layers
from sdtrain.families.adapter_names import ADAPTER as NAME

Row = tuple[int, int]
"""A picture of a step: the planned micro-batch that it belongs to, and which of its rows it is."""
STRIDE = 0x9E3779B97F4A7C15
"""An odd number with bits everywhere, so that the seeds of neighbouring rows have little in common."""


@dataclass(frozen=True)
class DropoutRates:
    """The shares that are left out, each in [0, 1).

    neurons: of the numbers that the down matrix of a LoRA gives (arXiv 1207.0580 at this place, `network_dropout` in
    sd-scripts; peft's `lora_dropout` drops the inputs of the down matrix instead). ranks: of the ranks of a LoRA, for
    each picture anew. modules: of the layers, whose adapters are then left out whole for all pictures of a micro-batch.
    """

    neurons: float = 0.0
    ranks: float = 0.0
    modules: float = 0.0


class AdapterDropout:
    """The dropout of all adapters of a run; it drops only within `drawn`, so not in previews and validation."""

    def __init__(self, networks: Sequence[nn.Module] = (), rates: DropoutRates | None = None) -> None:
        self._rates = rates or DropoutRates()
        active = self._rates != DropoutRates()
        self._layers: list[Any] = [layer for network in networks for layer in live_layers(network)] if active else []
        self._drawn: _Drawn | None = None
        if self._rates.neurons or self._rates.ranks:
            for index, layer in enumerate(self._layers):
                layer.lora_A[NAME].register_forward_hook(self._hook(index))

    @contextmanager
    def drawn(self, generator: Callable[[int], Generator], rows: Sequence[Row]) -> Iterator[None]:
        """Drop what generators on the CPU draw. Activations that backward computes again meet the same masks.

        generator: gives a fresh one for a planned micro-batch of the step, by its index. rows: of the pictures that are
        computed at once. A picture meets the same masks however many others are; which layers are left out follows from
        the planned micro-batch of the first.
        """
        if not self._layers:
            yield
            return
        num = len(self._layers)
        draws = {index: generator(index) for index in dict.fromkeys(index for index, _ in rows)}
        seeds = {index: torch.randint(2**62, (num,), generator=drawn).tolist() for index, drawn in draws.items()}
        left_out = torch.rand(num, generator=draws[rows[0][0]]) < self._rates.modules
        scales = [layer.scaling[NAME] for layer in self._layers]
        try:
            self._drawn = _Drawn(tuple(rows), seeds)
            if self._rates.modules:
                for layer, scale, goes in zip(self._layers, scales, left_out.tolist(), strict=True):
                    layer.scaling[NAME] = 0.0 if goes else scale / (1 - self._rates.modules)
            yield
        finally:
            self._drawn = None
            for layer, scale in zip(self._layers, scales, strict=True):
                layer.scaling[NAME] = scale

    def _hook(self, layer: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def drop(down: nn.Module, _: Any, hidden: Tensor) -> Tensor | None:
            if self._drawn is None:
                return None
            channel_axis = 1 if isinstance(down, nn.Conv2d) else hidden.dim() - 1
            parts = [
                _dropped(part, channel_axis, self._rates, generator)
                for part, generator in self._drawn.parts(hidden, layer)
            ]
            return torch.cat(parts)

        return drop


@dataclass(frozen=True)
class _Drawn:
    """What is drawn for the pictures that are computed at once. seeds: of each layer, by planned micro-batch."""

    rows: tuple[Row, ...]
    seeds: Mapping[int, Sequence[int]]

    def parts(self, hidden: Tensor, layer: int) -> Iterator[tuple[Tensor, Generator]]:
        """Yield what belongs to each picture of activations of a layer, with its generator.

        Of text encoders that may be several rows, or, where captions are empty, fewer than there are pictures: then
        each row counts as one. Masks are drawn on the layer's own device: as large as activations, they are too
        large to draw here and send there.
        """
        several, rest = divmod(hidden.shape[0], len(self.rows))
        first = self.rows[0][0]
        rows = [(first, number) for number in range(hidden.shape[0])] if rest or not several else self.rows
        for part, (index, row) in zip(hidden.chunk(len(rows)), rows, strict=True):
            yield part, Generator(hidden.device).manual_seed((self.seeds[index][layer] + row * STRIDE) % 2**63)


def _dropped(hidden: Tensor, channel_axis: int, rates: DropoutRates, generator: Generator) -> Tensor:
    """`hidden`, whose first axis counts pictures, with neurons and ranks left out."""
    if rates.neurons:
        hidden = _masked(hidden, hidden.shape, rates.neurons, generator)
    if rates.ranks:
        shape = [size if axis in (0, channel_axis) else 1 for axis, size in enumerate(hidden.shape)]
        hidden = _masked(hidden, shape, rates.ranks, generator)
    return hidden


def _masked(hidden: Tensor, shape: Sequence[int], rate: float, generator: Generator) -> Tensor:
    kept = torch.rand(shape, generator=generator, device=hidden.device) >= rate
    return hidden * kept / (1 - rate)
