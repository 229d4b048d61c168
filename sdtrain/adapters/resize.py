"""LoRAs of another rank."""

from __future__ import annotations

import torch

from sdtrain.adapters.kinds import Adapters, AdapterWeights, LoraWeights, kind_of
from sdtrain.adapters.low_rank import RankRule
from sdtrain.errors import Problem, UserError


@torch.no_grad()
def resize(adapters: Adapters, rule: RankRule) -> dict[str, dict[str, LoraWeights]]:
    """The nearest LoRAs of the rule's rank, layer by layer; alpha keeps its ratio to the rank.

    Raises UserError for kinds that are no product of two matrices.
    """
    others = [
        Problem(f"{component}.{module}", f"is {kind_of(weights)}; only LoRA has a rank that can be changed")
        for component, modules in adapters.items()
        for module, weights in modules.items()
        if not isinstance(weights, LoraWeights)
    ]
    if others:
        raise UserError("resize", others[:3])
    return {
        component: {module: _resized(weights, rule) for module, weights in modules.items()}
        for component, modules in adapters.items()
    }


def _resized(weights: AdapterWeights, rule: RankRule) -> LoraWeights:
    """The singular values of up @ down without multiplying them out: those of the small R_up @ R_down^T."""
    assert isinstance(weights, LoraWeights)
    left, up = torch.linalg.qr(weights.up.float().flatten(1))
    right, down = torch.linalg.qr(weights.down.float().flatten(1).T)
    inner_left, values, inner_right = torch.linalg.svd(up @ down.T, full_matrices=False)
    kept = rule.kept(values, values.double().square().sum())
    root = values[:kept].sqrt()
    new_up = (left @ inner_left)[:, :kept] * root
    new_down = root[:, None] * (inner_right @ right.T)[:kept]
    return LoraWeights(
        new_down.reshape(kept, *weights.down.shape[1:]).to(weights.down.dtype),
        new_up.reshape(weights.up.shape[0], kept, *weights.up.shape[2:]).to(weights.up.dtype),
        weights.alpha / weights.rank * kept,
    )
