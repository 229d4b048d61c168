"""Adapter files, under the names other tools know the layers by."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sdtrain.adapters.lora import LoraWeights


def peft_tensors(adapters: Mapping[str, Mapping[str, LoraWeights]]) -> dict[str, Tensor]:
    """Tensors under diffusers' names (`unet.<module>.lora_A.weight`), by network and module; float32, contiguous.

    These names have no place for alpha: the scale alpha / rank is multiplied into the up matrix.
    """
    tensors = {}
    for component, modules in adapters.items():
        for module, weights in modules.items():
            scale = weights.alpha / weights.rank
            tensors[f"{component}.{module}.lora_A.weight"] = weights.down.float().contiguous()
            tensors[f"{component}.{module}.lora_B.weight"] = (weights.up.float() * scale).contiguous()
    return tensors
