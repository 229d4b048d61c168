"""What an adapter does to the layer it sits on: the kinds, their tensors and the change dW they mean.

`delta` is the definition that every file format, the merge tool and the live layers are held against.
Sources: LoRA arXiv 2106.09685; rank-stabilised scale arXiv 2312.03732 (kept as alpha); DoRA arXiv
2402.09353, eq. 5; LoHa arXiv 2108.06098, prop. 2; LoKr arXiv 2309.14859, eq. 6; OFT arXiv 2306.07280, eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import torch
from torch import Tensor

AdapterKind = Literal["lora", "rslora", "dora", "loha", "lokr", "oft"]


@dataclass(frozen=True)
class LoraWeights:
    """The adapter of one layer: dW = alpha / rank * up @ down.

    down: (rank, in) or (rank, in, kh, kw); up: (out, rank) or (out, rank, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """dW in float32, shaped like the layer's weight."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.alpha / self.rank) * product.view(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class DoraWeights:
    """A direction and a length for each output: W + dW = magnitude * V / |V|, V = W + direction.delta().

    magnitude: (out,); |V| is the norm over everything but the output axis. on_inputs: whether it is (in,), a length for
    each input instead, as LyCORIS writes it where asked to; such are read, never trained.
    """

    direction: LoraWeights
    magnitude: Tensor
    on_inputs: bool = False

    @property
    def alpha(self) -> float:
        """Of the direction."""
        return self.direction.alpha

    @property
    def rank(self) -> int:
        """Of the direction."""
        return self.direction.rank


@dataclass(frozen=True)
class LohaWeights:
    """dW = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), the product elementwise.

    w1_a, w2_a: (out, rank); w1_b, w2_b: (rank, in * kh * kw).
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner dimension of both products."""
        return self.w1_b.shape[0]


@dataclass(frozen=True)
class LokrWeights:
    """dW = scale * kron(w1, w2); each factor is whole, or a product `a @ b` of the given rank.

    scale = alpha / rank, and 1 where both factors are whole: no rank is left to scale by, and readers ignore alpha.
    w1: (out1, in1); w2: (out2, in2) or (out2, in2, kh, kw); w2_a: (out2, rank); w2_b: (rank, in2 * kh * kw).
    """

    w1: Tensor | tuple[Tensor, Tensor]
    w2: Tensor | tuple[Tensor, Tensor]
    alpha: float

    @property
    def rank(self) -> int:
        """The inner dimension of the factors that are products; 0 when none is."""
        for factor in (self.w2, self.w1):
            if isinstance(factor, tuple):
                return factor[1].shape[0]
        return 0

    @property
    def scale(self) -> float:
        """The factor on the Kronecker product."""
        return self.alpha / self.rank if self.rank else 1.0


@dataclass(frozen=True)
class OftWeights:
    """A rotation of the inputs in blocks: W + dW = W R^T, R = Cayley(skew(vectors)) on each block of inputs.

    vectors: (blocks, block_size * (block_size - 1) / 2), the upper triangles, row by row. The rest is read, never
    trained: on_outputs: whether the outputs are rotated, W + dW = lengths * R W, as sd-scripts and LyCORIS do; lengths:
    (out,), None for ones; terms: of the series that peft may compute instead of Cayley's transform, 0 for the latter.
    """

    vectors: Tensor
    block_size: int
    on_outputs: bool = False
    lengths: Tensor | None = None
    terms: int = 0

    @property
    def rank(self) -> int:
        """The size of a block, which is what limits an OFT as the rank limits a LoRA."""
        return self.block_size

    @property
    def alpha(self) -> float:
        """A rotation has no scale; equal to the rank, as an unscaled LoRA's would be."""
        return float(self.block_size)


@dataclass(frozen=True)
class DiffWeights:
    """The change itself, as LyCORIS names it `diff`: nothing trains as such, but it is exact, and every UI reads it.

    change: dW, shaped like the layer's weight. bias: the change of its bias, (out,), None for none. The layer may be a
    normalisation, whose weight is (width,); such are read, never trained.
    """

    change: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """No rank limits it; 1, so that alpha / rank is 1."""
        return 1

    @property
    def alpha(self) -> float:
        """It has no scale."""
        return 1.0


AdapterWeights = LoraWeights | DoraWeights | LohaWeights | LokrWeights | OftWeights | DiffWeights
Adapters = Mapping[str, Mapping[str, AdapterWeights]]
"""component -> module -> weights."""


FileKind = Literal["lora", "dora", "loha", "lokr", "oft", "diff"]


def kind_of(weights: AdapterWeights) -> FileKind:
    """Return the kind of an adapter; a rank-stabilised LoRA is a LoRA with a larger alpha."""
    match weights:
        case LoraWeights():
            return "lora"
        case DoraWeights():
            return "dora"
        case LohaWeights():
            return "loha"
        case LokrWeights():
            return "lokr"
        case OftWeights():
            return "oft"
        case DiffWeights():
            return "diff"
        case _:
            assert_never(weights)


def delta(weights: AdapterWeights, base: Tensor) -> Tensor:
    """dW in float32, shaped like `base`, the weight of the layer (out, in) or (out, in, kh, kw)."""
    match weights:
        case LoraWeights():
            return weights.delta()
        case DoraWeights():
            direction = base.float() + weights.direction.delta().to(base.device)
            axis = 1 if weights.on_inputs else 0
            length: Tensor = direction.transpose(0, axis).flatten(1).norm(dim=1)
            factor = weights.magnitude.float().to(base.device) / length
            return direction * factor.view(*[1] * axis, -1, *[1] * (base.dim() - 1 - axis)) - base.float()
        case LohaWeights():
            left = weights.w1_a.float() @ weights.w1_b.float()
            right = weights.w2_a.float() @ weights.w2_b.float()
            return (weights.alpha / weights.rank) * (left * right).view(base.shape)
        case LokrWeights():
            return weights.scale * _kronecker(whole(weights.w1), whole(weights.w2)).view(base.shape)
        case OftWeights():
            return _rotated(weights, base.float()) - base.float()
        case DiffWeights():
            return weights.change.float().view(base.shape)
        case _:
            assert_never(weights)


def bias_delta(weights: AdapterWeights) -> Tensor | None:
    """The change of the layer's bias in float32, (out,); None for none."""
    bias = weights.bias if isinstance(weights, DiffWeights) else None
    return None if bias is None else bias.float()


def is_beyond_layers(weights: AdapterWeights) -> bool:
    """Whether it changes what no adapter here can: a bias, or the weight of a normalisation."""
    return isinstance(weights, DiffWeights) and (weights.bias is not None or weights.change.dim() < 2)


def idle_networks(adapters: Adapters) -> list[str]:
    """Networks whose adapters change nothing at all: after some steps, the sign of a run that trains nothing."""
    return [component for component, modules in adapters.items() if modules and all(map(_is_zero, modules.values()))]


def _is_zero(weights: AdapterWeights) -> bool:
    """Whether dW is exactly zero, seen from the factor that starts there. A DoRA's length is left out of it."""
    match weights:
        case LoraWeights():
            return not bool(weights.up.any())
        case DoraWeights():
            return _is_zero(weights.direction)
        case LohaWeights():
            return not (bool((weights.w1_a @ weights.w1_b).any()) and bool((weights.w2_a @ weights.w2_b).any()))
        case LokrWeights():
            return not (bool(whole(weights.w1).any()) and bool(whole(weights.w2).any()))
        case OftWeights():
            return not bool(weights.vectors.any())
        case DiffWeights():
            return not bool(weights.change.any()) and (weights.bias is None or not bool(weights.bias.any()))
        case _:
            assert_never(weights)


def mapped(weights: AdapterWeights, change: Callable[[Tensor], Tensor]) -> AdapterWeights:
    """The same kind of adapter with every tensor changed."""
    match weights:
        case LoraWeights():
            return LoraWeights(change(weights.down), change(weights.up), weights.alpha)
        case DoraWeights():
            direction = LoraWeights(change(weights.direction.down), change(weights.direction.up), weights.alpha)
            return DoraWeights(direction, change(weights.magnitude), weights.on_inputs)
        case LohaWeights():
            w1_a, w1_b, w2_a, w2_b = map(change, (weights.w1_a, weights.w1_b, weights.w2_a, weights.w2_b))
            return LohaWeights(w1_a, w1_b, w2_a, w2_b, weights.alpha)
        case LokrWeights():
            return LokrWeights(_mapped_factor(weights.w1, change), _mapped_factor(weights.w2, change), weights.alpha)
        case OftWeights():
            return replace(weights, vectors=change(weights.vectors), lengths=_mapped_some(weights.lengths, change))
        case DiffWeights():
            return DiffWeights(change(weights.change), _mapped_some(weights.bias, change))
        case _:
            assert_never(weights)


def _mapped_some(tensor: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if tensor is None else change(tensor)


def _mapped_factor(
    factor: Tensor | tuple[Tensor, Tensor], change: Callable[[Tensor], Tensor]
) -> Tensor | tuple[Tensor, Tensor]:
    return (change(factor[0]), change(factor[1])) if isinstance(factor, tuple) else change(factor)


def whole(factor: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """A Kronecker factor in float32, multiplied out if it is a product."""
    if isinstance(factor, tuple):
        return factor[0].float() @ factor[1].float()
    return factor.float()


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    return torch.kron(left.view(*left.shape, *[1] * (right.dim() - 2)), right.contiguous())


def _rotated(weights: OftWeights, base: Tensor) -> Tensor:
    """The layer's weight after the rotation, shaped like `base`, float32."""
    flat, rotation = base.flatten(1), _rotation(weights).to(base.device)
    if not weights.on_outputs:
        return (flat @ rotation.T).view(base.shape)
    turned = rotation @ flat
    if weights.lengths is not None:
        turned = weights.lengths.float().to(base.device).view(-1, 1) * turned
    return turned.view(base.shape)


def _rotation(weights: OftWeights) -> Tensor:
    """The block-diagonal R, (in, in) or (out, out), made of Q = skew(vectors): see `_turned`."""
    blocks, size = weights.vectors.shape[0], weights.block_size
    rows, columns = torch.triu_indices(size, size, 1)
    skew = torch.zeros(blocks, size, size)
    skew[:, rows, columns] = weights.vectors.detach().float().cpu()
    skew = skew - skew.transpose(1, 2)
    rotation = torch.zeros(blocks, size, blocks, size)
    rotation[torch.arange(blocks), :, torch.arange(blocks)] = _turned(skew, weights.terms)
    return rotation.view(blocks * size, blocks * size)


def _turned(skew: Tensor, terms: int) -> Tensor:
    """R = (I - Q)(I + Q)^-1 by Cayley's transform of Q = skew, (blocks, size, size).

    With terms: I + 2Q + 2Q^2 + ... with 1 instead of 2 for the last power, which is what peft computes instead: the
    beginning of the series of the inverse rotation (I + Q)(I - Q)^-1, so that the sign is another one, too.
    """
    one = torch.eye(skew.shape[-1]).expand_as(skew)
    if not terms:
        exact: Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
        return exact
    total, power = one.clone(), one
    last = max(3, terms - 1) if terms > 2 else terms - 1
    for number in range(1, last + 1):
        power = power @ skew
        total = total + (1 if number == last and terms > 2 else 2) * power
    return total
