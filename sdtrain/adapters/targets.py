"""Which layers of a network get adapters. Without torch, which only the functions that are handed networks need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, TypeVar, assert_never, cast

from sdtrain.errors import Problem, UserError

if TYPE_CHECKING:
    from torch import nn

Value = TypeVar("Value")
TargetPreset = Literal["attention", "attention+ff", "all-linear", "all"]

ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.q_proj", "*.k_proj", "*.v_proj", "*.out_proj")
FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2", "*attentions*.proj_in", "*attentions*.proj_out", "*.fc1", "*.fc2")


def last_match(patterns: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """Return the value of the last shell pattern that a module's whole name matches, or else `otherwise`."""
    return [otherwise, *(value for pattern, value in patterns.items() if fnmatchcase(name, pattern))][-1]


def select_modules(
    network: nn.Module, targets: TargetPreset | Sequence[str], *, unused: Sequence[str] = ()
) -> list[str]:
    """Return the names of the linear and convolution modules that `targets` means, in the network's order.

    A preset names a set; patterns are shell patterns over whole module names. Modules below a prefix in `unused` are
    left out. A pattern that matches nothing gives an empty list, which is for the caller to report.
    """
    names = []
    for name, module in network.named_modules():
        if any(name == prefix or name.startswith(prefix + ".") for prefix in unused):
            continue
        if _is_layer(module) and is_target(name, targets, is_linear=_is_linear(module)):
            names.append(name)
    return names


def is_target(name: str, targets: TargetPreset | Sequence[str], *, is_linear: bool) -> bool:
    """Return whether a linear or convolution layer of that name is meant."""
    if not isinstance(targets, str):
        return any(fnmatchcase(name, pattern) for pattern in targets)
    if name == "text_projection":
        return False  # no other tool has a name for an adapter there; a pattern can still ask for it
    return _in_preset(
        name, cast(TargetPreset, targets), is_linear=is_linear
    )  # a plain str is a Sequence[str] to the type checker


def _in_preset(name: str, preset: TargetPreset, *, is_linear: bool) -> bool:
    match preset:
        case "attention":
            return any(fnmatchcase(name, pattern) for pattern in ATTENTION)
        case "attention+ff":
            return any(fnmatchcase(name, pattern) for pattern in ATTENTION + FEED_FORWARD)
        case "all-linear":
            return is_linear
        case "all":
            return True
        case _:
            assert_never(preset)


def select_targets(
    networks: Mapping[str, nn.Module],
    targets: TargetPreset | Sequence[str],
    *,
    ranks: Iterable[str] = (),
    alphas: Iterable[str] = (),
    weights: Mapping[str, float] | None = None,
    unused: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[str]]:
    """Return component -> names of the layers that get adapters, for the networks that are trained.

    `ranks` and `alphas` are the patterns that set those of single layers. `weights` are by pattern, and layers whose
    weight is 0 get no adapter. Raises UserError for every pattern that means no layer, with the names that come near,
    and for a network in which no layer is meant.
    """
    skipped, weights = unused or {}, weights or {}
    found = {
        component: select_modules(network, targets, unused=skipped.get(component, ()))
        for component, network in networks.items()
    }
    layers = [name for network in networks.values() for name, module in network.named_modules() if _is_layer(module)]
    chosen = [name for modules in found.values() for name in modules]
    problems = []
    if not isinstance(targets, str):
        problems += _without_match("method.targets", targets, layers)
    for setting, patterns in (("ranks", ranks), ("alphas", alphas), ("layer_weights", weights)):
        problems += _without_match(f"method.{setting}", patterns, chosen)
    weighed = {
        component: [name for name in modules if last_match(weights, name, 1.0) > 0]
        for component, modules in found.items()
    }
    if not problems:
        problems += [
            Problem("method.targets", f"mean no layer of {component}; add a pattern for it, or leave it out of `train`")
            for component, modules in found.items()
            if not modules
        ]
        problems += [
            Problem("method.layer_weights", f"are 0 for every layer of {component}; leave it out of `train` instead")
            for component, modules in weighed.items()
            if found[component] and not modules
        ]
    if problems:
        raise UserError("method", problems)
    return weighed


def select_parameters(networks: Mapping[str, nn.Module], weights: Mapping[str, float]) -> dict[str, list[str]]:
    """Return component -> names of the parameters that are trained in full: those of layers whose weight is not 0.

    Raises UserError for every pattern that means no layer, with the names that come near, and for a network of which
    nothing is left.
    """
    owned = {
        component: {name: name.rpartition(".")[0] for name, _ in network.named_parameters()}
        for component, network in networks.items()
    }
    layers = list(dict.fromkeys(layer for names in owned.values() for layer in names.values()))
    problems = _without_match("method.layer_weights", weights, layers)
    kept = {
        component: [name for name, layer in names.items() if last_match(weights, layer, 1.0) > 0]
        for component, names in owned.items()
    }
    problems += [
        Problem("method.layer_weights", f"are 0 for every layer of {component}; leave it out of `train` instead")
        for component, names in kept.items()
        if not names
    ]
    if problems:
        raise UserError("method", problems)
    return kept


def _is_layer(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear | nn.Conv2d)


def _is_linear(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


def _without_match(setting: str, patterns: Iterable[str], layers: Sequence[str]) -> list[Problem]:
    return [
        Problem(setting, f"`{pattern}` matches no layer that is trained{_near(pattern, layers)}")
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in layers)
    ]


def _near(pattern: str, layers: Sequence[str]) -> str:
    """Ends of layer names that look like the pattern without its stars, and the pattern made whole where it is one."""
    core = pattern.strip("*.")
    if any(name.endswith(core) for name in layers) and core:
        return f"; patterns are held against whole names, did you mean `*{core}`?"
    ends = {".".join(name.split(".")[-count:]) for name in layers for count in range(1, 5)}
    near = get_close_matches(core, sorted(ends), n=3, cutoff=0.6)
    return "; did you mean " + " or ".join(f"`*{end}`" for end in near) + "?" if near else ""
