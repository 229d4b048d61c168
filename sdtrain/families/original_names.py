"""The names of tensors in the original checkpoint layout, derived by rule from diffusers' names.

Only one direction is written down: from a network's own parameter names to the original layout. The other direction is
the inverse of that mapping, so that the two can never disagree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sdtrain.families.family import Family
from sdtrain.families.words import DENOISER, Component

Form = Literal["same", "transposed", "convolution"]


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the original layout.

    key: the name of the tensor. third: which third of the rows of a fused query-key-value matrix it is; None for a
    tensor of its own. form: `transposed` matrices are stored as (in, out), a `convolution` has two trailing ones in
    its shape.
    """

    key: str
    third: int | None = None
    form: Form = "same"


def places_of(family: Family, component: Component, names: Iterable[str]) -> dict[str, Place]:
    """Return where every parameter of a network lies in the original layout, prefix included.

    Names of text encoders may begin with `text_model.` or not: transformers 5 leaves it out for encoders without
    projection.
    """
    prefix = family.prefix_of(component)
    names = list(names)
    encoder = family.text_encoder(component)
    rule: Callable[[str], Place]
    if encoder:
        rule = _clip_place if encoder.layout == "clip" else _open_clip_place
    else:
        rule = _unet_rule(names) if component == DENOISER else _vae_rule(names)
    places = {name: rule(name) for name in names}
    return {name: Place(prefix + place.key, place.third, place.form) for name, place in places.items()}


# ---- U-Net ----

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_unet_names(layers: Iterable[str]) -> dict[str, str]:
    """Return a U-Net layer's own name -> original name, without prefix; layers that no rule knows are left out."""
    names = [f"{layer}.weight" for layer in layers]
    rule = _unet_names(names)
    found = {name: rule(name) for name in names}
    return {name.removesuffix(".weight"): key.removesuffix(".weight") for name, key in found.items() if key}


def own_unet_names(originals: Iterable[str]) -> dict[str, str]:
    """Return a U-Net layer's original name, without prefix -> its own name; the inverse of `original_unet_names`.

    originals: all layers there are, from which the blocks are counted. Those that no rule knows are left out, which are
    all where nothing tells how many layers a block has.
    """
    layers = list(originals)
    samplers = [int(match[1]) for layer in layers if (match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op", layer))]
    if not samplers:
        return {}
    per_block = min(samplers) - 1
    attends = {
        str(int(match[1]) // (per_block + 1))
        for layer in layers
        if (match := re.match(r"output_blocks\.(\d+)\.1\.proj_in", layer))
    }
    own = {
        key.removesuffix(".weight"): name
        for name in _unet_names_there_may_be(per_block, len(samplers) + 1)
        if (key := _unet_key(f"{name}.weight", per_block, attends))
    }
    found = {}
    for layer in layers:
        block = re.match(r"(?:input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+", layer)
        if layer in own:
            found[layer] = own[layer]
        elif block and f"{block[0]}.proj_in" in own:  # a transformer, below which all names are the same
            found[layer] = own[f"{block[0]}.proj_in"].removesuffix("proj_in") + layer[block.end() + 1 :]
    return found


def _unet_names_there_may_be(per_block: int, num_blocks: int) -> Iterator[str]:
    """Yield the own names of layers that a U-Net of such blocks can have; of a transformer the first one."""
    yield from UNET_ENDS
    for side, blocks in {"down_blocks": per_block, "up_blocks": per_block + 1}.items():
        for block in range(num_blocks):
            for index in range(blocks):
                yield from (f"{side}.{block}.resnets.{index}.{layer}" for layer in RESNET)
                yield f"{side}.{block}.attentions.{index}.proj_in"
            yield f"{side}.{block}.{side.removesuffix('_blocks')}samplers.0.conv"
    for index in range(2):
        yield from (f"mid_block.resnets.{index}.{layer}" for layer in RESNET)
    yield "mid_block.attentions.0.proj_in"


def _unet_rule(names: list[str]) -> Callable[[str], Place]:
    rule = _unet_names(names)

    def place(name: str) -> Place:
        key = rule(name)
        assert key, f"no rule for the U-Net's parameter {name}"
        return Place(key)

    return place


def _unet_names(names: list[str]) -> Callable[[str], str | None]:
    """Return the rule from the U-Net's own names to original ones.

    names: all names of the U-Net, from which its blocks are counted.
    """
    resnets = {match[1] for name in names if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))}
    attends = {match[1] for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    return lambda name: _unet_key(name, len(resnets), attends)


def _unet_key(name: str, layers: int, attends: set[str]) -> str | None:
    """Return the original name of a parameter, None where no rule knows it.

    The original layout numbers blocks through: each down block has its layers and a downsampler, each up block a
    layer more.
    """
    stem, _, leaf = name.rpartition(".")
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{leaf}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, index, rest = match.groups()
        number = 2 * int(index) + (kind == "attentions")
        return _below(f"middle_block.{number}", kind, rest)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not match:
        return None
    side, block, kind, index, rest = match.groups()
    first = 1 + int(block) * (layers + 1) if side == "down" else int(block) * (layers + 1)
    stem = f"{'input' if side == 'down' else 'output'}_blocks."
    match kind:
        case "downsamplers":
            return f"{stem}{first + layers}.0.{rest.replace('conv.', 'op.', 1)}"
        case "upsamplers":
            return f"{stem}{first + layers}.{2 if block in attends else 1}.{rest}"
        case _:
            return _below(f"{stem}{first + int(index)}.{int(kind == 'attentions')}", kind, rest)


def _below(block: str, kind: str, rest: str) -> str | None:
    if kind == "attentions":
        return f"{block}.{rest}"
    layer, _, leaf = rest.rpartition(".")
    return f"{block}.{RESNET[layer]}.{leaf}" if layer in RESNET else None


# ---- VAE ----

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _vae_rule(names: list[str]) -> Callable[[str], Place]:
    blocks = {match[1] for name in names if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name))}
    return lambda name: _vae_place(name, len(blocks))


def _vae_place(name: str, blocks: int) -> Place:
    """Return where a parameter of the VAE lies; the original counts the decoder's blocks from the finest.

    diffusers counts them from the coarsest.
    """
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.match(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        side, layer, leaf = match.groups()
        form: Form = "convolution" if leaf == "weight" and layer != "group_norm" else "same"
        return Place(f"{side}.mid.attn_1.{VAE_ATTENTION[layer]}.{leaf}", form=form)
    if match := re.match(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return Place(f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}")
    match = re.match(r"(\w+)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not match:
        return Place(name)
    coder, side, block, kind, index, rest = match.groups()
    number = int(block) if side == "down" else blocks - 1 - int(block)
    layer = f"block.{index}" if kind == "resnets" else kind.removesuffix("rs")
    return Place(f"{coder}.{side}.{number}.{layer}.{rest}")


def old_vae_name(name: str) -> str:
    """Return the name that a parameter of the VAE's attention had in older diffusers folders; others keep theirs."""
    for new, old in OLD_VAE_ATTENTION.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def new_vae_name(name: str) -> str:
    """Return the present name of a parameter that `old_vae_name` renamed; names that are new already stay."""
    for new, old in OLD_VAE_ATTENTION.items():
        name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
    return name


# ---- text encoders ----

OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYERS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def with_text_prefix(name: str) -> str:
    """Return the name of a text encoder's layer or parameter in files: below `text_model.`, except for the projection.

    transformers 5 dropped the prefix from one of its two classes.
    """
    return name if name.split(".")[0] in ("text_model", "text_projection") else f"text_model.{name}"


def _clip_place(name: str) -> Place:
    return Place(with_text_prefix(name))


def _open_clip_place(name: str) -> Place:
    if name == "text_projection.weight":
        return Place("text_projection", form="transposed")
    name = name.removeprefix("text_model.")
    if name in OPEN_CLIP_ENDS:
        return Place(OPEN_CLIP_ENDS[name])
    match = re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match, f"no rule for the text encoder's parameter {name}"
    block, layer, leaf = match.groups()
    stem = f"transformer.resblocks.{block}."
    if projection := re.fullmatch(r"self_attn\.([qkv])_proj", layer):
        return Place(f"{stem}attn.in_proj_{leaf}", third="qkv".index(projection[1]))
    return Place(f"{stem}{OPEN_CLIP_LAYERS[layer]}.{leaf}")
