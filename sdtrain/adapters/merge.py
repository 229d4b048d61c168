"""Adapters added into the weights below them, for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sdtrain.adapters.kinds import Adapters, bias_delta, delta
from sdtrain.adapters.layers import plain_modules
from sdtrain.errors import user_error


@torch.no_grad()
def merge_into(networks: Mapping[str, nn.Module], adapters: Sequence[tuple[Adapters, float]]) -> int:
    """Add adapters, each times its weight, to the networks' own weights; returns how many layers were changed.

    All dW are computed from the weights as they were, in float32, and added before the sum is rounded once to the
    type the layer is stored in: the order of the adapters does not matter. Raises UserError for adapters of a network
    that was not handed in.
    """
    unknown = sorted({name for one, _ in adapters for name in one} - networks.keys())
    if unknown:
        raise user_error("merge", unknown[0], "has adapters, but no such network is in this model; choose another")
    changed = 0
    for component, network in networks.items():
        layers = dict(plain_modules(network))
        for module in sorted({name for one, _ in adapters for name in one.get(component, {})}):
            terms = [(one[component][module], share) for one, share in adapters if module in one.get(component, {})]
            layer = layers[module]
            weight, bias = layer.weight, layer.bias
            assert isinstance(weight, Tensor)
            _add(weight, [(delta(weights, weight), share) for weights, share in terms])
            changes = [(change, share) for weights, share in terms if (change := bias_delta(weights)) is not None]
            if changes:
                assert isinstance(bias, Tensor)
                _add(bias, changes)
            changed += 1
    return changed


def _add(parameter: Tensor, changes: Sequence[tuple[Tensor, float]]) -> None:
    total = parameter.float()
    for change, share in changes:
        total = total + share * change.to(parameter.device)
    parameter.copy_(total)
