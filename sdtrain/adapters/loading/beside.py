"""A file's adapters put beside the weights of a model, as they stood there in training.

Added into weights of 16 bits a small change is lost to rounding, up to half of it; beside them it stays in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, nn

from sdtrain.adapters.attach import AdapterSettings, adapter_weights, attach_adapters, copy_into, live_layers
from sdtrain.adapters.formats.alphas import most_frequent
from sdtrain.adapters.kinds import AdapterKind, Adapters, AdapterWeights, kind_of
from sdtrain.errors import UserError

ATTACHED: Mapping[str, AdapterKind] = {"lora": "lora", "dora": "dora", "loha": "loha", "lokr": "lokr", "oft": "oft"}
"""The kinds of which layers exist, by the names that `kind_of` gives them."""


@torch.no_grad()
def put_beside(networks: Mapping[str, nn.Module], adapters: Adapters) -> bool:
    """Attach adapters (component -> module -> weights) to the networks' layers, for good; return whether it was done.

    It is not, and the networks are as they were, where the weights are of several kinds in one network, or of a form
    that no layer here has: they can be added into the weights then, see `merge_into`.
    """
    done: list[nn.Module] = []
    for component, modules in adapters.items():
        if not modules:
            continue
        network = networks[component]
        done.append(network)
        if not _attached(network, modules):
            for one in done:
                _detach(one)
            return False
    return True


def _attached(network: nn.Module, modules: Mapping[str, AdapterWeights]) -> bool:
    kinds = {kind_of(weights) for weights in modules.values()}
    kind = ATTACHED.get(kinds.pop()) if len(kinds) == 1 else None
    if kind is None:
        return False
    ranks = {module: max(1, weights.rank) for module, weights in modules.items()}
    alphas = {module: weights.alpha for module, weights in modules.items()}
    rank, alpha = int(most_frequent(ranks.values())), most_frequent(alphas.values())
    settings = AdapterSettings(
        kind,
        rank,
        alpha,
        {module: own for module, own in ranks.items() if own != rank and kind != "oft"},
        {module: own for module, own in alphas.items() if own != alpha and kind != "oft"},
    )
    try:
        attach_adapters(network, list(modules), settings, Generator())
        live = adapter_weights(network)
        for module, weights in modules.items():
            copy_into(live[module], weights)
    except (UserError, ValueError):  # of another form than layers here have: Tucker's convolutions, whole factors
        return False
    return True


def _detach(network: nn.Module) -> None:
    """Take adapters off a network again; what only marks how inputs were made stays, and changes no number."""
    names = {module: name for name, module in network.named_modules()}
    for layer in list(live_layers(network)):
        parent, _, last = names[layer].rpartition(".")
        setattr(network.get_submodule(parent), last, layer.get_submodule("base_layer"))
    network.__dict__.pop("peft_config", None)
