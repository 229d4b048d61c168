"""The frozen layers of a network that mark what they give with how it is made: normalisations and gates."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn import functional

from sdtrain.adapters.lean.inputs import mark


def mark_what_is_remade(network: nn.Module) -> None:
    """Let the normalisations and gates of a network mark what they give, but for those that are trained."""
    for module in network.modules():
        if type(module) is GEGLU:
            module.__class__ = MarkingGate
        elif type(module) is nn.LayerNorm and not any(weight.requires_grad for weight in module.parameters()):
            module.register_forward_hook(_mark_normalised)


class MarkingGate(GEGLU):  # type: ignore[misc]  # of diffusers' types nothing is known here
    """A value times GELU of a gate (arXiv 2002.05202); autograd keeps both factors."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return value * gelu(gate), (..., width), of hidden states (..., in); other arguments mean nothing."""
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        opened = self.gelu(gate)
        output: Tensor = value * opened
        mark(output, torch.mul, value, opened)
        return output


def _mark_normalised(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    assert isinstance(norm, nn.LayerNorm)
    compute = partial(_normalised, norm.normalized_shape, norm.eps)
    mark(output, compute, inputs[0], *(weight for weight in (norm.weight, norm.bias) if weight is not None))


def _normalised(
    shape: tuple[int, ...], eps: float, inputs: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    return functional.layer_norm(inputs, list(shape), weight, bias, eps)
