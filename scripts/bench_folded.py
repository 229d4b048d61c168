"""The U-Net of `bench_tasks.py` while a LoRA of it is trained: one function, fewer operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.adapters.attach import adapter_weights
from sdtrain.adapters.kinds import LoraWeights


class FoldedUNet(nn.Module):
    """A U-Net whose LoRA is added to its weights once per call.

    It is the same function as the U-Net with adapter layers, to the last bits, in about half the time for a model as
    small as this, where there is hardly more work in a layer than in starting it.
    """

    def __init__(self, plain: nn.Module, adapters: dict[str, LoraWeights]) -> None:
        super().__init__()
        self.plain = plain
        self.adapters = adapters
        self.dtype = torch.float32

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool,
    ) -> tuple[Tensor]:
        """Return what the U-Net predicts, in a tuple, as diffusers does."""
        weights: dict[str, Tensor] = {
            name: self.plain.get_parameter(name) + adapter.delta() for name, adapter in self.adapters.items()
        }
        conditioning = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added_cond_kwargs}
        settings = {**conditioning, "return_dict": return_dict}
        output: tuple[Tensor] = torch.func.functional_call(self.plain, weights, (noisy, timesteps), settings)
        return output


def live_adapters(network: nn.Module, parameters: Any) -> dict[str, LoraWeights]:
    """Return a network's LoRA by the name of the weight that it changes, with the parameters that are trained."""
    found = {}
    for layer, weights in adapter_weights(network).items():
        down, up = (parameters[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        found[f"{layer}.weight"] = LoraWeights(down, up, weights.alpha)
    return found
