"""peft's layers with our forward; what ours does not do goes to theirs, which is its plain twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import loha, lokr, lora
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn

from sdtrain.adapters.lean.dora import Dora
from sdtrain.adapters.lean.inputs import remade
from sdtrain.adapters.lean.loha import Hadamard
from sdtrain.adapters.lean.lokr import Kronecker
from sdtrain.adapters.lean.lora import LowRank
from sdtrain.adapters.lean.marking import mark_what_is_remade
from sdtrain.adapters.lean.oft import Rotation, never_ask
from sdtrain.adapters.lean.products import POINT, Product, Window
from sdtrain.adapters.quantised.layer import QuantisedLinear, frozen_weight
from sdtrain.families.adapter_names import ADAPTER as NAME
from sdtrain.matmul import LINEAR


def make_lean(network: nn.Module) -> None:
    """Let the adapters of a network compute with our forward, where there is one, and norms and gates help them.

    Their parameters and names, and everything else of peft's layers, stay. Of OFT only the rotation is ours.
    """
    for module in network.modules():
        if type(module) not in LEAN or not _is_plain(module.get_submodule("base_layer")):
            continue
        module.__class__ = LEAN[type(module)]
        if isinstance(module, lora.LoraLayer):
            down = module.get_submodule(f"lora_A.{NAME}")
            down.__class__ = Down if isinstance(down, nn.Linear) else DownOfPixels
    never_ask(network)
    mark_what_is_remade(network)


def make_plain(network: nn.Module) -> None:
    """Give the adapters of a network peft's own forward again, which ours is measured against."""
    theirs = {ours: plain for plain, ours in LEAN.items()}
    theirs |= {Down: nn.Linear, DownOfPixels: nn.Conv2d, Rotation: OFTRotationModule}
    for module in network.modules():
        module.__class__ = theirs.get(type(module), type(module))


def _is_plain(base: nn.Module) -> bool:
    """Whether a frozen layer is one whose product we can take apart: of one group, padded with zeros."""
    if type(base) is nn.Conv2d:
        return base.groups == 1 and base.padding_mode == "zeros" and not isinstance(base.padding, str)
    return type(base) in (*LINEAR, QuantisedLinear)


def _is_usual(layer: Any, inputs: Tensor) -> bool:
    """Whether a layer is as in training: its one adapter is live, and nobody else chooses types.

    Merged and disabled adapters, and several at once, are peft's. Under autocast a backward would not know the types.
    """
    if layer.disable_adapters or layer.merged or list(layer.active_adapters) != [NAME]:
        return False
    return not torch.is_autocast_enabled(inputs.device.type)


def _window(layer: nn.Module) -> Window | None:
    if not isinstance(layer, nn.Conv2d):
        return None
    assert not isinstance(layer.padding, str)
    return Window(layer.stride, layer.padding, layer.dilation)


class Down(nn.Linear):
    """The down matrix of a LoRA whose output somebody changes, such as `AdapterDropout`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product with the inputs, in their type."""
        if torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return _applied(Product, input, self.weight, None, remade(input))


class DownOfPixels(nn.Conv2d):
    """The down convolution of a LoRA whose output somebody changes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the convolved inputs, in their type."""
        if torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return _applied(Product, input, self.weight, _window(self), remade(input))


def _lora(layer: Any, inputs: Tensor) -> Tensor:
    frozen, down, up, scale = layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME].weight, layer.scaling[NAME]
    window = _window(frozen)
    if down._forward_hooks:  # dropout wants to see what is inside, which then has to be kept; it is small
        return _tensor(frozen(inputs) + _applied(Product, down(inputs), up * scale, window and POINT, None))
    rest = (frozen_weight(frozen), frozen.bias, scale, window, remade(inputs))
    return _applied(LowRank, inputs, down.weight, up, *rest)


def _dora(layer: Any, inputs: Tensor) -> Tensor:
    frozen, magnitude = layer.base_layer, layer.lora_magnitude_vector[NAME].weight
    down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    rest = (frozen_weight(frozen), frozen.bias, layer.scaling[NAME], _window(frozen), remade(inputs))
    return _applied(Dora, inputs, down, up, magnitude, *rest)


def _loha(layer: Any, inputs: Tensor) -> Tensor:
    factors = [each[NAME] for each in (layer.hada_w1_a, layer.hada_w1_b, layer.hada_w2_a, layer.hada_w2_b)]
    frozen = layer.base_layer
    rest = (layer.scaling[NAME], frozen_weight(frozen).shape, _window(frozen), remade(inputs))
    return _applied(Hadamard, frozen(inputs), inputs, *factors, *rest)


def _lokr(layer: Any, inputs: Tensor) -> Tensor:
    window = _window(layer.base_layer)
    w1 = layer.lokr_w1[NAME] if NAME in layer.lokr_w1 else layer.lokr_w1_a[NAME] @ layer.lokr_w1_b[NAME]
    w2 = layer.lokr_w2[NAME] if NAME in layer.lokr_w2 else layer.lokr_w2_a[NAME] @ layer.lokr_w2_b[NAME]
    if window is not None and w2.dim() == 2:
        w2 = w2.view(w2.shape[0], -1, *layer.base_layer.kernel_size)
    w1 = w1 * layer.scaling[NAME]
    return _applied(Kronecker, layer.base_layer(inputs), inputs, w1, w2, window, remade(inputs))


def _low_rank(layer: Any, inputs: Tensor) -> Tensor:
    return _dora(layer, inputs) if NAME in layer.lora_magnitude_vector else _lora(layer, inputs)


def _lean(theirs: Any, change: Callable[[Any, Tensor], Tensor]) -> Any:
    """Return peft's class of a layer with `change` as its forward, wherever the layer is as usual."""

    class Lean(theirs):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or not _is_usual(self, x):
                return _tensor(super().forward(x, *args, **kwargs))
            return change(self, x)

    Lean.__name__ = Lean.__qualname__ = f"Lean{theirs.__name__}"
    return Lean


LEAN = {
    theirs: _lean(theirs, change)
    for theirs, change in (
        (lora.Linear, _low_rank),
        (lora.Conv2d, _low_rank),
        (loha.layer.Linear, _loha),
        (loha.layer.Conv2d, _loha),
        (lokr.layer.Linear, _lokr),
        (lokr.layer.Conv2d, _lokr),
    )
}
"""peft's classes of layers, and ours in their place."""


def _applied(function: Any, *arguments: Any) -> Tensor:
    return _tensor(function.apply(*arguments))


def _tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found
