"""A LoRA that comes closest to the difference of two networks, or to another LoRA, by singular values.

The best approximation of a matrix by one of rank r keeps its r largest singular values (Eckart and Young 1936).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from sdtrain.adapters.kinds import Adapters, AdapterWeights, LoraWeights, kind_of
from sdtrain.adapters.layers import plain_modules
from sdtrain.errors import Problem, UserError, user_error

OVERSAMPLING = 16
POWER_ITERATIONS = 4


@dataclass(frozen=True)
class RankRule:
    """How many singular values are kept: at most `rank`, and no more than hold `energy` of the sum of squares."""

    rank: int
    energy: float = 1.0

    def kept(self, values: Tensor, total: Tensor) -> int:
        """Return how many of the descending singular values (r,) are kept, at least one.

        `total` is the sum of the squares of all of them, () float64.
        """
        most = min(self.rank, len(values))
        if self.energy >= 1:
            return most
        share = values[:most].double().square().cumsum(0) / total.clamp_min(torch.finfo(torch.float64).tiny)
        return min(most, int((share < self.energy).sum()) + 1)


@torch.no_grad()
def extract(
    base: Mapping[str, nn.Module],
    tuned: Mapping[str, nn.Module],
    rule: RankRule,
    *,
    modules: Mapping[str, list[str]],
    smallest: float = 1e-6,
) -> dict[str, dict[str, LoraWeights]]:
    """Return the LoRA of tuned - base as component -> module -> weights, for the named modules; alpha is the rank.

    Layers whose weights differ by less than `smallest` of their own norm are left out: they were not tuned. Raises
    UserError for networks of other shapes.
    """
    found: dict[str, dict[str, LoraWeights]] = {}
    for component, names in modules.items():
        before, after = dict(plain_modules(base[component])), dict(plain_modules(tuned[component]))
        for name in names:
            old, new = before[name].weight, after[name].weight
            assert isinstance(old, Tensor)
            assert isinstance(new, Tensor)
            if old.shape != new.shape:
                what = f"has shape {tuple(old.shape)} in one model and {tuple(new.shape)} in the other"
                raise user_error("extract", f"{component}.{name}", f"{what}; choose two of one family")
            change = new.float() - old.float().to(new.device)
            if change.norm() > smallest * old.float().norm():
                found.setdefault(component, {})[name] = approximate(change, rule)
    return found


def approximate(change: Tensor, rule: RankRule) -> LoraWeights:
    """Return the LoRA nearest to dW, (out, in) or (out, in, kh, kw), float32.

    Each of its two factors carries the square roots of the singular values.
    """
    flat = change.float().flatten(1)
    left, values, right = _largest(flat, rule.rank)
    kept = rule.kept(values, flat.double().square().sum())
    root = values[:kept].sqrt()
    up, down = left[:, :kept] * root, root[:, None] * right[:kept]
    ones = [1] * (change.dim() - 2)
    return LoraWeights(down.reshape(kept, *change.shape[1:]), up.reshape(-1, kept, *ones), float(kept))


def _largest(flat: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, values and right vectors of at least the `rank` largest singular values, descending.

    A wide matrix of which few are wanted is first projected on a random subspace that power iterations turn towards
    them (Halko, Martinsson and Tropp 2011, algorithm 4.4): seconds instead of minutes for the layers of SDXL.
    """
    wanted = rank + OVERSAMPLING
    if 4 * wanted > min(flat.shape):
        left, values, right = torch.linalg.svd(flat, full_matrices=False)
        return left, values, right
    generator = Generator().manual_seed(0)
    space = flat @ torch.randn(flat.shape[1], wanted, generator=generator).to(flat.device)
    for _ in range(POWER_ITERATIONS):
        space = flat @ (flat.T @ torch.linalg.qr(space)[0])
    basis = torch.linalg.qr(space)[0]
    left, values, right = torch.linalg.svd(basis.T @ flat, full_matrices=False)
    return basis @ left, values, right


def without_rank(adapters: Adapters) -> dict[tuple[str, str], str]:
    """Return (component, module) -> why it has no rank that can be changed, for the layers where that is so."""
    return {
        (component, module): f"is {kind_of(weights)}; only LoRA has a rank that can be changed"
        for component, modules in adapters.items()
        for module, weights in modules.items()
        if not isinstance(weights, LoraWeights)
    }


@torch.no_grad()
def resize(adapters: Adapters, rule: RankRule) -> dict[str, dict[str, LoraWeights]]:
    """Return the nearest LoRAs of the rule's rank, layer by layer; alpha keeps its ratio to the rank.

    Raises UserError for kinds that are no product of two matrices.
    """
    others = without_rank(adapters)
    if others:
        raise UserError("resize", [Problem(".".join(layer), what) for layer, what in others.items()][:3])
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


@dataclass(frozen=True)
class Summed:
    """A LoRA in place of a sum of changes, and what it loses of it.

    squared_change: |dW|^2 of the sum, Frobenius. squared_loss: |dW - what is kept|^2.
    """

    weights: LoraWeights
    squared_change: float
    squared_loss: float


@torch.no_grad()
def summed(terms: Sequence[tuple[LoraWeights, float]], rule: RankRule) -> Summed:
    """Return the LoRA nearest to the sum of several of one layer, each times its weight; alpha is its rank.

    The sum of products is one product of the matrices side by side: sum w_i U_i D_i = [w_1 U_1 ...] [D_1; ...], whose
    singular values are those of the small R_up R_down^T. Computed in float64, written in float32.
    """
    first = terms[0][0]
    ups = [weight * one.alpha / one.rank * one.up.double().flatten(1) for one, weight in terms]
    downs = [one.down.double().flatten(1) for one, _ in terms]
    left, up = torch.linalg.qr(torch.cat(ups, 1))
    right, down = torch.linalg.qr(torch.cat(downs).T)
    inner_left, values, inner_right = torch.linalg.svd(up @ down.T, full_matrices=False)
    total = values.square().sum()
    kept = rule.kept(values, total)
    root = values[:kept].sqrt()
    new_up = (left @ inner_left)[:, :kept] * root
    new_down = root[:, None] * (inner_right @ right.T)[:kept]
    found = LoraWeights(
        new_down.reshape(kept, *first.down.shape[1:]).float(),
        new_up.reshape(first.up.shape[0], kept, *[1] * (first.down.dim() - 2)).float(),
        float(kept),
    )
    return Summed(found, float(total), float(values[kept:].square().sum()))
