"""Dropout of adapters: while a loss is computed, parts of them are left out at random and the rest counts for more.

The masks follow from a generator that is handed in, never from the global one, so that a run that goes on draws what it
would have drawn. The mean over all draws is the adapter itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sdtrain.adapters.attach import live_layers
from sdtrain.families.adapter_names import ADAPTER as NAME


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
        self._seeds: list[int] | None = None
        if self._rates.neurons or self._rates.ranks:
            for index, layer in enumerate(self._layers):
                layer.lora_A[NAME].register_forward_hook(self._hook(index))

    @contextmanager
    def drawn(self, generator: Generator) -> Iterator[None]:
        """Drop what `generator`, on the CPU, draws. Activations that backward computes again meet the same masks."""
        if not self._layers:
            yield
            return
        num = len(self._layers)
        seeds = torch.randint(2**62, (num,), generator=generator).tolist()
        kept = (torch.rand(num, generator=generator) >= self._rates.modules).tolist()
        scales = [layer.scaling[NAME] for layer in self._layers]
        try:
            self._seeds = seeds
            if self._rates.modules:
                for layer, scale, stays in zip(self._layers, scales, kept, strict=True):
                    layer.scaling[NAME] = scale / (1 - self._rates.modules) if stays else 0.0
            yield
        finally:
            self._seeds = None
            for layer, scale in zip(self._layers, scales, strict=True):
                layer.scaling[NAME] = scale

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def drop(down: nn.Module, _: Any, hidden: Tensor) -> Tensor | None:
            if self._seeds is None:
                return None
            # On the layer's own device: these masks are as large as activations, too large to draw here and send there.
            generator = Generator(hidden.device).manual_seed(self._seeds[index])
            channel_axis = 1 if isinstance(down, nn.Conv2d) else hidden.dim() - 1
            return _dropped(hidden, channel_axis, self._rates, generator)

        return drop


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
