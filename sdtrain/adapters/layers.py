"""The layers of a network as they are below adapters, asked without importing peft where none was ever attached."""

from __future__ import annotations

import sys
from typing import cast

from torch import nn


def layer_names(network: nn.Module) -> list[str]:
    """The linear and convolution layers of a network, with or without adapters on them, in its order."""
    return [name for name, module in plain_modules(network) if isinstance(module, nn.Linear | nn.Conv2d)]


def plain_modules(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by the names they had before adapters were attached; the layers below an adapter are left out."""
    found: list[tuple[str, nn.Module]] = []
    wrapped: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(prefix) for prefix in wrapped):
            continue
        base = base_layer(module)
        if base is not None:
            wrapped = [name + "."]  # named_modules goes depth first: only the last wrapper can hold what follows
        found.append((name, module if base is None else base))
    return found


def base_layer(module: nn.Module) -> nn.Module | None:
    """The frozen layer below an adapter, or None for a module that is no adapter.

    Importing peft costs seconds; as long as nobody has imported it, no module can be one of its layers.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not isinstance(module, tuners.BaseTunerLayer):
        return None
    return cast(nn.Module, module.get_base_layer())
