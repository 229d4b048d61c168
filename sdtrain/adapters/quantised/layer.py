"""Linear layers whose frozen weight is packed: what they compute, and what they do not keep for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdtrain.adapters.quantised.packing import Packed, Packing, packed, packed_bytes
from sdtrain.matmul import LINEAR, linear, matmul

LEFT = ("time_embedding.*", "add_embedding.*", "*.time_emb_proj")
"""Layers that stay as they are: they tell every pixel the timestep and the size, and are 1 % of SDXL's U-Net."""

SENSITIVE = ("*.proj_in", "*.proj_out", "*.attn2.to_v", "*.attn2.to_out.0")
"""Layers that nf4 keeps in 8 bits. They bring the caption in and go straight into what all later blocks read: an eighth
of SDXL's packed weights, and seven eighths of what 4 bits change of the gradients of the built-in model."""

Original = Callable[[], Tensor]
"""Reads a weight as it was before it was packed."""


class QuantisedLinear(nn.Linear):
    """A frozen linear layer in few bits; its weight is there while a product is computed, in the inputs' type."""

    def __init__(self, layer: nn.Linear, weight: Packed, original: Original) -> None:
        """weight: of the layer. original: reads what it was packed from."""
        nn.Module.__init__(self)  # that of a linear layer would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packing, self.dtype, self.original = weight.packing, layer.weight.dtype, original
        self.register_buffer("values", weight.values, persistent=False)
        self.register_buffer("scales", weight.scales, persistent=False)
        self.bias = layer.bias
        self.training = layer.training

    @property
    def packed(self) -> Packed:
        """The weight in few bits."""
        values, scales = self.get_buffer("values"), self.get_buffer("scales")
        return Packed(self.packing, torch.Size((self.out_features, self.in_features)), values, scales)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that it computes with, (out, in), made anew; of `original` it is an approximation."""
        return self.packed.unpacked(self.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product with the inputs, (..., out), in their type."""
        product: Any = _Product
        output = product.apply(input, self.packed, self.bias)
        assert isinstance(output, Tensor)
        return output


class _Product(torch.autograd.Function):
    """W x + bias, of which backward keeps nothing: autograd itself would keep W, unpacked."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """Return the product, (..., out)."""
        ctx.packed = weight
        return linear(inputs, weight.unpacked(inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the inputs."""
        return matmul(gradient, ctx.packed.unpacked(gradient.dtype)), None, None


def quantise(
    network: nn.Module,
    packing: Packing,
    device: torch.device,
    original: Callable[[str], Tensor],
    pack: Callable[[Tensor, Packing], Packed] = packed,
) -> None:
    """Put packed layers on `device` into the place of the linear layers of a frozen network, one after another.

    So a device never holds the network as it was. original: reads a parameter again by its name. pack: see `packed`.
    """
    for name, layer in list(_layers(network)):
        weight = pack(layer.weight.detach().to(device), packing_of(name, packing))
        network.set_submodule(name, QuantisedLinear(layer, weight, _reader(original, f"{name}.weight")))


def base_bytes(network: nn.Module, packing: Packing | None) -> int:
    """Return the bytes of a network that is not packed, as it would be; packing: None for as it is."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
    if packing is None:
        return total
    return total - sum(
        layer.weight.numel() * layer.weight.element_size() - packed_bytes(layer.weight.shape, packing_of(name, packing))
        for name, layer in _layers(network)
    )


def packing_of(name: str, packing: Packing) -> Packing:
    """Return how a layer is packed where the network is packed so: see `SENSITIVE`."""
    return "int8" if packing == "nf4" and any(fnmatchcase(name, pattern) for pattern in SENSITIVE) else packing


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers that are packed, by name."""
    for name, layer in network.named_modules():
        if type(layer) in LINEAR and not any(fnmatchcase(name, pattern) for pattern in LEFT):
            yield name, layer


def _reader(original: Callable[[str], Tensor], name: str) -> Original:
    return lambda: original(name)


def frozen_weight(layer: nn.Module) -> Tensor | Packed:
    """Return the weight of a frozen layer, packed where it is."""
    if isinstance(layer, QuantisedLinear):
        return layer.packed
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def original_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a frozen layer as it was before it was packed, on its device.

    Raises UserError if it cannot be read again.
    """
    if isinstance(layer, QuantisedLinear):
        return layer.original().to(layer.packed.values.device)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
