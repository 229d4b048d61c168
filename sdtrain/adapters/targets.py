"""Which layers of a network get adapters."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, assert_never, cast

from torch import nn

TargetPreset = Literal["attention", "attention+ff", "all-linear", "all"]

ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.q_proj", "*.k_proj", "*.v_proj", "*.out_proj")
FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2", "*attentions*.proj_in", "*attentions*.proj_out", "*.fc1", "*.fc2")


def select_modules(
    network: nn.Module, targets: TargetPreset | Sequence[str], *, unused: Sequence[str] = ()
) -> list[str]:
    """Names of the linear and convolution modules that `targets` means, in the network's order.

    A preset names a set; patterns are shell patterns over whole module names. Modules below a prefix in `unused` are
    left out. A pattern that matches nothing gives an empty list, which is for the caller to report.
    """
    names = []
    for name, module in network.named_modules():
        if any(name == prefix or name.startswith(prefix + ".") for prefix in unused):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d) and _is_target(name, module, targets):
            names.append(name)
    return names


def _is_target(name: str, module: nn.Module, targets: TargetPreset | Sequence[str]) -> bool:
    if not isinstance(targets, str):
        return any(fnmatchcase(name, pattern) for pattern in targets)
    return _in_preset(name, module, cast(TargetPreset, targets))  # a plain str is a Sequence[str] to the type checker


def _in_preset(name: str, module: nn.Module, preset: TargetPreset) -> bool:
    match preset:
        case "attention":
            return any(fnmatchcase(name, pattern) for pattern in ATTENTION)
        case "attention+ff":
            return any(fnmatchcase(name, pattern) for pattern in ATTENTION + FEED_FORWARD)
        case "all-linear":
            return isinstance(module, nn.Linear)
        case "all":
            return True
        case _:
            assert_never(preset)
