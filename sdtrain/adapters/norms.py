"""How large the change of each layer is, and a limit on it.

`scale_weight_norms` of sd-scripts: after each step the adapters of a layer whose |dW| is above a limit are scaled down
to it, all factors of the product by the same share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdtrain.adapters.attach import adapter_weights, layer_of
from sdtrain.adapters.kinds import AdapterWeights, LohaWeights, LokrWeights, LoraWeights, whole

SLACK = 1e-5
"""What a norm may exceed its limit by, relatively: rounding, so that a limit that is kept changes no bit."""


@dataclass(frozen=True)
class LimitedLayer:
    """The adapter of a layer, as views of its parameters, and these; dW is a product in which each stands once."""

    weights: AdapterWeights
    parameters: tuple[nn.Parameter, ...]


def limited_layers(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[LimitedLayer]:
    """Return the layers of a network with adapters, whose parameters are given by name."""
    by_layer: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_layer.setdefault(layer_of(name), []).append(parameter)
    live = adapter_weights(network)
    return [LimitedLayer(live[layer], tuple(own)) for layer, own in by_layer.items()]


@torch.no_grad()
def change_norms(layers: Sequence[LimitedLayer]) -> Tensor:
    """Return the Frobenius norms |dW| of the layers, (n,) float32, as their parameters are now."""
    return torch.stack([change_norm(layer.weights) for layer in layers])


def change_norm(weights: AdapterWeights) -> Tensor:
    """Return the Frobenius norm of dW, () float32, without making dW where its factors tell it.

    Raises TypeError for kinds whose dW is no product of their tensors.
    """
    match weights:
        case LoraWeights():  # |U D|^2 = sum of (U^T U) * (D D^T), elementwise: two small matrices
            up, down = weights.up.float().flatten(1), weights.down.float().flatten(1)
            square = ((up.T @ up) * (down @ down.T)).sum()
            return weights.alpha / weights.rank * square.clamp(min=0).sqrt()
        case LohaWeights():
            left = weights.w1_a.float() @ weights.w1_b.float()
            right = weights.w2_a.float() @ weights.w2_b.float()
            return weights.alpha / weights.rank * (left * right).square().sum().sqrt()
        case LokrWeights():
            squares = whole(weights.w1).square().sum() * whole(weights.w2).square().sum()
            return weights.scale * squares.sqrt()
        case _:
            raise TypeError(f"{type(weights).__name__} is no product of its tensors")


def shares_within(norms: Tensor, limit: float, num_factors: Sequence[int]) -> list[Tensor]:
    """Return what the factors of each layer are multiplied by, () each, so that no |dW| in `norms` (n,) is above limit.

    It is exactly 1 where the limit is kept, and where a norm is not a number. num_factors: how many factors share the
    scaling, by layer.
    """
    ratios = torch.where(norms > limit * (1 + SLACK), limit / norms, 1.0)
    powers = torch.tensor([1 / num for num in num_factors], device=norms.device)
    return list((ratios**powers).unbind())
