"""What other tools call the layers of a model, by rule from its module tree.

sd-scripts trains SDXL in its original layout, so its names count input, middle and output blocks through; diffusers
and peft use the module tree of the diffusers classes. No table of names is kept: the number of layers in each block
is read from the tree, which makes the rule hold for SDXL, for smaller relatives and for the embedded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count, takewhile

from torch import nn

from sdtrain.adapters.layers import layer_names, plain_modules
from sdtrain.families.words import Family

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_unet_names(modules: Iterable[str]) -> dict[str, str]:
    """Linear and convolution layers of an SDXL-shaped U-Net, diffusers name -> name in the original layout.

    `modules` are all module names of the tree: the block numbers are counted from them.
    """
    names = set(modules)
    prefixes = dict(_TOP) | _down_prefixes(names) | _up_prefixes(names)
    for layer in _numbers(names, "mid_block.resnets"):
        prefixes[f"mid_block.resnets.{layer}"] = f"middle_block.{2 * layer}"
    for layer in _numbers(names, "mid_block.attentions"):
        prefixes[f"mid_block.attentions.{layer}"] = f"middle_block.{2 * layer + 1}"
    found = {}
    for name in names:
        original = _original(name, prefixes)
        if original is not None:
            found[name] = original
    return found


def _original(name: str, prefixes: Mapping[str, str]) -> str | None:
    if name in prefixes:
        return prefixes[name]
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        prefix, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
        if prefix in prefixes:
            inner = _RESNET.get(rest) if ".resnets." in prefix else rest
            return None if inner is None else f"{prefixes[prefix]}.{inner}"
    return None


def _down_prefixes(names: set[str]) -> dict[str, str]:
    prefixes, index = {}, 1  # input block 0 is conv_in
    for block in _numbers(names, "down_blocks"):
        for layer in _numbers(names, f"down_blocks.{block}.resnets"):
            prefixes[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{index}.0"
            prefixes[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        if f"down_blocks.{block}.downsamplers.0" in names:
            prefixes[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    return prefixes


def _up_prefixes(names: set[str]) -> dict[str, str]:
    prefixes, index = {}, 0
    for block in _numbers(names, "up_blocks"):
        for layer in _numbers(names, f"up_blocks.{block}.resnets"):
            prefixes[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{index}.0"
            prefixes[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{index}.1"
            index += 1
        # The upsampler ends the block's last layer: after its attention where there is one.
        place = 2 if f"up_blocks.{block}.attentions" in names else 1
        prefixes[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{place}.conv"
    return prefixes


def _numbers(names: set[str], parent: str) -> list[int]:
    """0, 1, ... as long as `parent.<number>` is in the tree."""
    return list(takewhile(lambda number: f"{parent}.{number}" in names, count()))


def is_sdxl(networks: Mapping[str, nn.Module]) -> bool:
    """SDXL and its relatives have a second text encoder, and a U-Net with extra conditioning."""
    unet = networks.get("unet")
    return "text_encoder_2" in networks or (
        unet is not None and any(name == "add_embedding" for name, _ in unet.named_modules())
    )


def family_of(networks: Mapping[str, nn.Module]) -> Family:
    """The model family, by what its networks are made of: SD 2.x reads text that is 1024 wide."""
    if is_sdxl(networks):
        return "sdxl"
    text_widths = {
        module.in_features
        for network in networks.values()
        for name, module in plain_modules(network)
        if isinstance(module, nn.Linear) and name.endswith(("attn2.to_k", "self_attn.k_proj"))
    }
    return "sd2" if 1024 in text_widths else "sd1"


def sd_scripts_names(networks: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """component -> module -> sd-scripts name (`lora_unet_...`), for every linear and convolution layer.

    SD 1.x and 2.x, which have one text encoder, keep the names of the diffusers tree (`lora_te_...`).
    """
    sdxl = is_sdxl(networks)
    return {component: _sd_scripts(component, network, sdxl) for component, network in networks.items()}


def _sd_scripts(component: str, network: nn.Module, sdxl: bool) -> dict[str, str]:
    layers = layer_names(network)
    match component:
        case "unet":
            original = original_unet_names(name for name, _ in plain_modules(network)) if sdxl else {}
            return {name: "lora_unet_" + _flat(original.get(name, name)) for name in layers}
        case "text_encoder":
            return {name: ("lora_te1_" if sdxl else "lora_te_") + _flat(_text_name(name)) for name in layers}
        case "text_encoder_2":
            return {name: "lora_te2_" + _flat(_text_name(name)) for name in layers}
        case _:
            raise ValueError(f"no names for a network called {component!r}")


def _flat(dotted: str) -> str:
    return dotted.replace(".", "_")


def diffusers_names(networks: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """component -> module -> diffusers name (`unet.down_blocks...`), for every linear and convolution layer."""
    return {
        component: {
            name: f"{component}.{name if component == 'unet' else _text_name(name)}" for name in layer_names(network)
        }
        for component, network in networks.items()
    }


def _text_name(module: str) -> str:
    """With the `text_model.` that files carry and that transformers 5 dropped from one of the two classes."""
    return module if module.startswith(("text_model.", "text_projection")) else f"text_model.{module}"
