"""Low-rank adapters on frozen layers, by peft (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from sdtrain.adapters.weights import LoraWeights

__all__ = ["LoraWeights", "attach_lora", "lora_weights"]


def attach_lora(
    network: nn.Module, modules: Sequence[str], *, rank: int, alpha: float, generator: Generator
) -> dict[str, nn.Parameter]:
    """Give the named modules of a frozen network adapters; returns the new parameters, float32, by name.

    Down matrices are uniform in +-1/sqrt(fan_in) from `generator`, up matrices are zero, so that the network computes
    what it computed before.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules), init_lora_weights=False)
    with torch.random.fork_rng():  # peft draws from the global generator; ours must not move it
        inject_adapter_in_model(config, network)
    parameters = {}
    for name, parameter in network.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            parameter.requires_grad_(False)
            continue
        parameter.data = _initial(name, parameter, generator).to(parameter.device)
        parameter.requires_grad_(True)
        parameters[name] = parameter
    return parameters


def _initial(name: str, parameter: Tensor, generator: Generator) -> Tensor:
    if ".lora_B." in name:
        return torch.zeros(parameter.shape, dtype=torch.float32)
    bound = 1 / math.sqrt(parameter[0].numel())
    return (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound


def lora_weights(network: nn.Module) -> dict[str, LoraWeights]:
    """The adapters of a network by the name of the layer they sit on; tensors are views of the parameters."""
    from peft.tuners.lora import LoraLayer

    return {
        name: LoraWeights(
            down=module.lora_A["default"].weight.detach(),
            up=module.lora_B["default"].weight.detach(),
            alpha=float(module.scaling["default"] * module.r["default"]),
        )
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer)
    }
