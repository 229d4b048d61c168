"""What other tools call the layers of a model, by rule from its module tree.

sd-scripts trains SDXL in its original layout, so its names count input, middle and output blocks through; diffusers
and peft use the module tree of the diffusers classes. No table of names is kept: the number of layers in each block
is read from the tree, which makes the rule hold for SDXL, for smaller relatives and for the embedded model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sdtrain.adapters.layers import layer_names, norm_names, plain_modules
from sdtrain.families.family import Family
from sdtrain.families.known import family_of_networks
from sdtrain.families.original_names import original_unet_names, with_text_prefix
from sdtrain.families.words import DENOISER, LORA_UNET_PREFIX


def family_of(networks: Mapping[str, nn.Module]) -> Family:
    """Return the family that networks are of, by what they are made of."""
    unet = networks.get(DENOISER)
    text_widths = {
        module.in_features
        for network in networks.values()
        for name, module in plain_modules(network)
        if isinstance(module, nn.Linear) and name.endswith(("attn2.to_k", "self_attn.k_proj"))
    }
    takes_sizes = None if unet is None else any(name == "add_embedding" for name, _ in unet.named_modules())
    return family_of_networks(networks, takes_sizes=takes_sizes, text_widths=text_widths)


def sd_scripts_names(networks: Mapping[str, nn.Module], *, norms: bool = False) -> dict[str, dict[str, str]]:
    """Return component -> module -> sd-scripts name (`lora_unet_...`), for every linear and convolution layer.

    norms: whether for the normalisations, too.
    """
    family = family_of(networks)
    return {
        component: _sd_scripts(component, _named(network, norms=norms), family)
        for component, network in networks.items()
    }


def _named(network: nn.Module, *, norms: bool) -> list[str]:
    return layer_names(network) + (norm_names(network) if norms else [])


def _sd_scripts(component: str, layers: list[str], family: Family) -> dict[str, str]:
    if component == DENOISER:
        original = original_unet_names(layers) if family.lora_in_original_layout else {}
        return {name: LORA_UNET_PREFIX + _flat(original.get(name, name)) for name in layers}
    for encoder in family.text_encoders:
        if encoder.component == component:
            return {name: encoder.lora_prefix + _flat(with_text_prefix(name)) for name in layers}
    raise ValueError(f"no names for a network called {component!r}")


def _flat(dotted: str) -> str:
    return dotted.replace(".", "_")


def diffusers_names(networks: Mapping[str, nn.Module], *, norms: bool = False) -> dict[str, dict[str, str]]:
    """Return component -> module -> diffusers name (`unet.down_blocks...`), for every linear and convolution layer.

    norms: whether for the normalisations, too.
    """
    return {
        component: {
            name: f"{component}.{name if component == DENOISER else with_text_prefix(name)}"
            for name in _named(network, norms=norms)
        }
        for component, network in networks.items()
    }
