"""The names that layers and parameters had before peft put adapters around them, by name alone: no peft, no torch."""

from __future__ import annotations

from collections.abc import Iterable

ADAPTER = "default"
"""What the one adapter of each layer is called: peft keeps several apart by name."""

BELOW = ".base_layer"
"""The name that peft gives to the frozen layer inside an adapter."""


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return name without adapters -> name now, for everything that is no adapter, in the order given.

    `names` are all modules, or all parameters, of one network. A layer with an adapter is named `x` and holds the
    frozen `x.base_layer` and the adapter's own parts; the frozen one counts as `x` and the parts are left out.
    """
    every = list(names)
    wrapped = {name.split(BELOW)[0] for name in every if BELOW in name}
    plain: dict[str, str] = {}
    for name in every:
        if BELOW in name:
            plain[name.replace(BELOW, "", 1)] = name
        elif name not in wrapped and not _is_below(name, wrapped):
            plain[name] = name
    return plain


def _is_below(name: str, wrapped: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:cut]) in wrapped for cut in range(1, len(parts)))
