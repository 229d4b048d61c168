"""Derives the configurations of a single file's networks from the names and shapes of its tensors.

What shapes cannot tell (the number of heads, activations, groups of the norms) is taken from what was published for the
family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdtrain.errors import UserError, user_error
from sdtrain.families.family import Family, TextEncoder
from sdtrain.families.known import FAMILIES, FIRST_LAYER, family_of_file
from sdtrain.families.published_configs import HEAD_WIDTH
from sdtrain.families.sdxl import REFINER_TEXT
from sdtrain.families.words import DENOISER, Component
from sdtrain.files.header import Header

Shapes = Mapping[str, tuple[int, ...]]

LORA_MARKS = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", "lora_unet_", "lora_te", ".hada_w1", ".lokr_w1")
UNLIKE = "has tensors in shapes that no {} has; is the file another model's, or was it changed?"
EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


def detect_family(header: Header) -> Family:
    """Return the family of a whole checkpoint. Raises UserError for any other file and says what it is instead."""
    names = header.entries
    source = str(header.path)
    if any(mark in name for name in names for mark in LORA_MARKS):
        raise user_error(
            source, _first(header, LORA_MARKS), "is a LoRA's key: give model.path the checkpoint it is for"
        )
    edm = [name for name in EDM_KEYS if name in names]
    if edm:
        raise user_error(source, edm[0], "marks a model with EDM noise levels, which cannot be trained here")
    unets = {family.unet_prefix for family in FAMILIES.values()}
    first = [prefix + FIRST_LAYER for prefix in sorted(unets)]
    there = [key for key in first if key in names]
    if not there:
        raise user_error(source, first[0], _not_a_checkpoint(header))
    _refuse_extra_inputs(header, there[0])
    if any(name.startswith(REFINER_TEXT) for name in names):
        raise user_error(source, REFINER_TEXT + "*", "marks an SDXL refiner; give model.path a base model")
    family = family_of_file(names)
    if family is None:
        usual = next(iter(FAMILIES.values())).text_encoders[0].prefix
        what = "is missing: the file has no text encoders; give model.path a whole checkpoint"
        raise user_error(source, usual + "*", what)
    return family


def _first(header: Header, marks: tuple[str, ...]) -> str:
    return next(name for name in header.entries for mark in marks if mark in name)


def _not_a_checkpoint(header: Header) -> str:
    if any(name.startswith(("double_blocks.", "joint_blocks.", "model.diffusion_model.")) for name in header.entries):
        return "is missing: this is a model of another family; Stable Diffusion XL, 1.x and 2.x are known"
    if any(name.startswith(("encoder.", "decoder.")) for name in header.entries):
        return "is missing: this is a VAE; it belongs into model.vae, next to a checkpoint in model.path"
    if any(name.startswith("down_blocks.") for name in header.entries):
        return "is missing: this is one part of a diffusers folder; give model.path the folder with model_index.json"
    return "is missing: this is not a Stable Diffusion checkpoint in the original layout"


def _refuse_extra_inputs(header: Header, key: str) -> None:
    shape = header.entries[key].shape
    if len(shape) != 4:
        raise user_error(str(header.path), key, f"has the shape {list(shape)}, which the first layer of no model has")
    channels = shape[1]
    kinds = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth model"}
    if channels != 4:
        kind = kinds.get(channels, "not a text-to-image model")
        raise user_error(
            str(header.path), key, f"has {channels} input channels instead of 4: this is {kind}, which is not supported"
        )


def shapes_of(header: Header, prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): entry.shape for name, entry in header.entries.items() if name.startswith(prefix)}


def config_of(header: Header, family: Family, component: Component, prefix: str | None = None) -> dict[str, Any]:
    """Return the configuration of one network of a single file, as diffusers or transformers spell it.

    Raises UserError when the network is not in the file or has a shape that no configuration expresses.
    """
    prefix = family.prefix_of(component) if prefix is None else prefix
    shapes = shapes_of(header, prefix)
    if not shapes:
        raise user_error(str(header.path), prefix + "*", f"is missing: the file has no {component}")
    encoder = family.text_encoder(component)
    try:
        if encoder:
            return clip_config(shapes, encoder) if encoder.layout == "clip" else open_clip_config(shapes, encoder)
        if component == DENOISER:
            return unet_config(shapes, family, _pooled_width(header, family))
        return vae_config(shapes, family)
    except KeyError as error:
        raise user_error(str(header.path), prefix + str(error.args[0]), "is missing; is the file whole?") from None
    except (IndexError, ValueError, ZeroDivisionError):  # a matrix where the family has a vector, a side of 0, ...
        raise user_error(str(header.path), prefix + "*", UNLIKE.format(family.title)) from None
    except UserError as error:
        raise UserError(str(header.path), error.problems) from None


def trusted_config_of(header: Header, family: Family, component: Component) -> dict[str, Any]:
    """Return the configuration of one network of a single file, refused where its shapes are unlike any published ones.

    For such shapes the heads and the groups of the norms would be guesses, and a wrong guess is a broken model
    without an error. Raises UserError.
    """
    config = config_of(header, family, component)
    grain = config.get("norm_num_groups", 1) if component == "vae" else HEAD_WIDTH
    widths = config.get("block_out_channels", [config.get("hidden_size", 0)])
    if any(width % grain for width in widths):
        raise user_error(
            str(header.path),
            family.prefix_of(component) + "*",
            f"has layers of {', '.join(map(str, widths))} channels, unlike any published model: name a folder with its "
            f"{component}/config.json in model.components",
        )
    return config


def _pooled_width(header: Header, family: Family) -> int:
    """Return the width of the pooled text that the U-Net's extra conditioning starts with; 0 where there is none."""
    encoder = family.pooled_encoder
    if encoder is None:
        return 0
    shapes = shapes_of(header, encoder.prefix)
    try:
        return _projected_width(shapes)
    except KeyError:
        name = "text_projection" if encoder.layout == "open-clip" else "text_projection.weight"
        raise user_error(str(header.path), encoder.prefix + name, "is missing; is the file whole?") from None


def _projected_width(shapes: Shapes) -> int:
    """Return how wide projected text is: the outputs of a layer, or the columns of a matrix. Raises KeyError."""
    layer = "text_projection.weight"
    return shapes[layer][0] if layer in shapes else shapes["text_projection"][1]


def _count(shapes: Shapes, pattern: str) -> int:
    """Return how many different numbers stand in the pattern's first group, over all names that it fits."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


# ---- U-Net ----


def unet_config(shapes: Shapes, family: Family, pooled_width: int) -> dict[str, Any]:
    """Return the configuration of a U-Net from the shapes of its tensors by original name, without prefix."""
    downsamplers = [int(m[1]) for name in shapes if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name))]
    layers = min(downsamplers) - 1 if downsamplers else _count(shapes, r"input_blocks\.(\d+)\.") - 1
    first_layers = [1 + block * (layers + 1) for block in range(len(downsamplers) + 1)]
    channels = [shapes[f"input_blocks.{index}.0.out_layers.3.weight"][0] for index in first_layers]
    down = [[_depth(shapes, f"input_blocks.{start + layer}.1") for layer in range(layers)] for start in first_layers]
    up_starts = [block * (layers + 1) for block in range(len(channels))]
    up = [[_depth(shapes, f"output_blocks.{start + layer}.1") for layer in range(layers + 1)] for start in up_starts]
    config = {
        **family.unet,
        **_depth_config(down, up, _mid_depth(shapes)),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "cross_attention_dim": _first_shape(shapes, r".*\.attn2\.to_k\.weight")[1],
        "use_linear_projection": len(_first_shape(shapes, r"input_blocks\.\d+\.1\.proj_in\.weight")) == 2,
        "attention_head_dim": _heads(channels, family),
    }
    return {**config, **_extra_conditioning(shapes, family, pooled_width)}


def _first_shape(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    """Return the shape of the first tensor whose name fits. Raises KeyError with the pattern when there is none."""
    for name, shape in shapes.items():
        if re.fullmatch(pattern, name):
            return shape
    raise KeyError(pattern)


def _depth(shapes: Shapes, stem: str) -> int:
    """Return the number of transformer blocks in one attention layer; 0 where there is no attention."""
    return _count(shapes, re.escape(stem) + r"\.transformer_blocks\.(\d+)\.")


def _mid_depth(shapes: Shapes) -> int | None:
    """Return the number of transformer blocks in the middle; None for the single ResNet of pruned models."""
    return _depth(shapes, "middle_block.1") if "middle_block.2.in_layers.0.weight" in shapes else None


def _depth_config(down: list[list[int]], up: list[list[int]], mid: int | None) -> dict[str, Any]:
    """Return where attention is and how deep, in diffusers' words.

    One number per block is enough for SDXL itself; pruned models differ from layer to layer and between the sides.
    Raises UserError for what diffusers' words cannot express.
    """
    if any(min(block) == 0 < max(block) for block in (*down, *up)):
        raise user_error("", "attention", "is in some layers of a block only, which diffusers' U-Net cannot express")
    last = down[-1][0] or mid or 1  # diffusers' U-Net has one number for the last block and the middle
    if mid is not None and mid != last:
        raise user_error("", "middle_block.1", f"is {mid} deep, the block before it {last}; cannot be expressed")
    kinds = {
        "down_block_types": ["CrossAttnDownBlock2D" if block[0] else "DownBlock2D" for block in down],
        "up_block_types": ["CrossAttnUpBlock2D" if block[0] else "UpBlock2D" for block in up],
        "mid_block_type": "UNetMidBlock2D" if mid is None else "UNetMidBlock2DCrossAttn",
    }
    even = all(len(set(block)) == 1 for block in (*down, *up))
    mirrored = [block[0] for block in down] == [block[0] for block in reversed(up)]
    if even and mirrored:
        return {**kinds, "transformer_layers_per_block": [*(block[0] or 1 for block in down[:-1]), last]}
    return {
        **kinds,
        "transformer_layers_per_block": [block if block[0] else 1 for block in down],
        "reverse_transformer_layers_per_block": [block if block[0] else 1 for block in up],
    }


def _heads(channels: list[int], family: Family) -> list[int]:
    """Return the number of heads of each block; diffusers calls the setting attention_head_dim all the same."""
    if family.num_heads:
        return [family.num_heads] * len(channels)
    return [max(1, width // HEAD_WIDTH) for width in channels]


def _extra_conditioning(shapes: Shapes, family: Family, pooled_width: int) -> dict[str, Any]:
    """Return how sizes and pooled text are added to the time embedding; empty for families without sizes.

    The layer reads the pooled text, then six numbers, each as a sinusoid.
    """
    if not family.takes_sizes:
        return {}
    width = shapes["label_emb.0.0.weight"][1]
    return {"projection_class_embeddings_input_dim": width, "addition_time_embed_dim": (width - pooled_width) // 6}


# ---- VAE ----


def vae_config(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Return the configuration of a VAE from the shapes of its tensors by original name, without prefix."""
    blocks = _count(shapes, r"encoder\.down\.(\d+)\.")
    return {
        **family.vae,
        "block_out_channels": [shapes[f"encoder.down.{block}.block.0.conv2.weight"][0] for block in range(blocks)],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


# ---- text encoders ----


def clip_config(shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    """Return the configuration of a text encoder from the shapes of its tensors under transformers' names."""
    vocab, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        **encoder.config,
        "vocab_size": vocab,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        "hidden_size": width,
        "projection_dim": _projected_width(shapes) if encoder.pooled else width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "num_hidden_layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
    }


def open_clip_config(shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    """Return the configuration of a text encoder from the shapes of its tensors under OpenCLIP's names.

    Layers whose output nobody reads are left out.
    """
    vocab, width = shapes["token_embedding.weight"]
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    return {
        **encoder.config,
        "vocab_size": vocab,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        "hidden_size": width,
        "projection_dim": _projected_width(shapes) if encoder.pooled else width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "max_position_embeddings": shapes["positional_embedding"][0],
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "num_hidden_layers": layers - encoder.spare_layers,
    }
