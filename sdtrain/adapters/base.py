"""The base under the adapters: what a network computes without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sdtrain.adapters.attach import live_layers


@contextmanager
def without_adapters(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Let networks compute as if they had no adapters; which parameters are trained stays as it is.

    peft's own switch, `enable_adapters`, would unfreeze what is not trained any more.
    """
    layers: list[Any] = [layer for network in networks for layer in live_layers(network)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
