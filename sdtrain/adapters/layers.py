"""The layers of a network as they are below adapters, asked without importing peft, which costs seconds."""

from __future__ import annotations

from torch import nn

from sdtrain.families.adapter_names import plain_names


def layer_names(network: nn.Module) -> list[str]:
    """The linear and convolution layers of a network, with or without adapters on them, in its order."""
    return [name for name, module in plain_modules(network) if isinstance(module, nn.Linear | nn.Conv2d)]


def norm_names(network: nn.Module) -> list[str]:
    """The normalisations of a network, in its order: they get no adapter here, but files of others change them."""
    return [name for name, module in plain_modules(network) if isinstance(module, nn.GroupNorm | nn.LayerNorm)]


def plain_modules(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by the names they had before adapters were attached; the layers below an adapter are left out."""
    modules = dict(network.named_modules())
    return [(plain, modules[name]) for plain, name in plain_names(modules).items()]
