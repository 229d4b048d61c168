"""Inputs of adapters that are not kept, because what they are made from is kept in any case.

A frozen layer normalisation keeps its input; what it gives is computed from it again in a moment. The gate of a
feed-forward block keeps both factors of the product that it gives. Their outputs are marked with how they are made, and
the adapters that are handed them keep that instead. A mark dies with its tensor, and means nothing once the tensor was
written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MARK = "_sdtrain_remade"


@dataclass(frozen=True)
class Remade:
    """How a tensor is computed again, bit for bit: compute(*tensors). version: of the tensor that it is true of."""

    compute: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    version: int


def remade(inputs: Tensor) -> Remade | None:
    """Return how an input is made, where that is known. A compiler decides itself what it computes again."""
    if torch.compiler.is_compiling():
        return None
    found: Remade | None = inputs.__dict__.get(MARK)
    return found if found is not None and found.version == inputs._version else None


def kept_of(inputs: Tensor, how: Remade | None) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return how some inputs are got in backward, and the tensors that are kept for it."""
    return (_as_it_is, (inputs,)) if how is None else (how.compute, how.tensors)


def _as_it_is(inputs: Tensor) -> Tensor:
    return inputs


def mark(output: Tensor, compute: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Note on a tensor that it is compute(*tensors), where anything is kept for backward at all."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        output.__dict__[MARK] = Remade(compute, tuple(tensor.detach() for tensor in tensors), output._version)
