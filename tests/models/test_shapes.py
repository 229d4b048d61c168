"""Configurations follow from names and shapes: SDXL as published, its pruned relatives, SD 1.x and 2.x."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.families.family import Family
from sdtrain.families.original_names import original_unet_names, own_unet_names, places_of
from sdtrain.families.published_configs import CLIP_L_TEXT, OPEN_CLIP_G_TEXT, SCHEDULER, SDXL_UNET, SDXL_VAE
from sdtrain.families.sd import SD1
from sdtrain.families.sdxl import SDXL
from sdtrain.files.header import Entry, Header
from sdtrain.files.tensors import Planned
from sdtrain.models.checkpoints.components import Components
from sdtrain.models.checkpoints.configs_from_shapes import config_of, detect_family, unet_config
from sdtrain.models.checkpoints.networks import empty_network
from sdtrain.models.checkpoints.single_file import changed_weights, configs_metadata, original_tensors

PUBLISHED: dict[str, dict[str, Any]] = {
    "unet": SDXL_UNET,
    "vae": SDXL_VAE,
    "text_encoder": CLIP_L_TEXT,
    "text_encoder_2": OPEN_CLIP_G_TEXT,
}
PRUNED = {"mid_block_type": "UNetMidBlock2D"}
SSD_1B = {
    **SDXL_UNET,
    **PRUNED,
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
VEGA = {
    **SDXL_UNET,
    **PRUNED,
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
}
SD1_UNET = {
    **SDXL_UNET,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "attention_head_dim": [8] * 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "transformer_layers_per_block": [1, 1, 1, 1],
    "sample_size": 64,
    "use_linear_projection": False,
}


def header_of(family: Family, configs: dict[str, dict[str, Any]]) -> Header:
    """The header of a single file of these networks, without a file."""
    entries = {}
    for component in family.components:
        network = empty_network(SDXL, component, configs[component])
        shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
        for name, place in places_of(family, component, shapes).items():
            shape = shapes[name]
            if place.form == "transposed":
                shape = shape[::-1]
            elif place.form == "convolution":
                shape = (*shape, 1, 1)
            if place.third is not None:
                shape = (3 * shape[0], *shape[1:])
            entries[place.key] = Entry("F16", shape, 0, 0)
    return Header(Path("model.safetensors"), entries, {})


@pytest.fixture(scope="module")
def sdxl() -> Header:
    return header_of(SDXL, PUBLISHED)


def test_published_sdxl_has_its_known_size() -> None:
    counts = {}
    for component in SDXL.components:
        parameters = list(empty_network(SDXL, component, PUBLISHED[component]).parameters())
        counts[component] = (sum(parameter.numel() for parameter in parameters), len(parameters))
    assert counts["unet"] == (2_567_463_684, 1_680)
    assert counts["vae"][0] == 83_653_863
    assert counts["text_encoder"][0] == 123_060_480
    assert counts["text_encoder_2"][0] == 694_659_840


@pytest.mark.parametrize("component", SDXL.components)
def test_sdxl_configs_follow_from_shapes(sdxl: Header, component: Any) -> None:
    assert detect_family(sdxl) == SDXL
    derived = config_of(sdxl, SDXL, component)
    assert {key: derived[key] for key in PUBLISHED[component]} == PUBLISHED[component]


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight",
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.encoder.down.2.downsample.conv.bias",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "first_stage_model.decoder.up.0.block.2.norm1.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight",
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_proj.bias",
        "conditioner.embedders.1.model.token_embedding.weight",
        "conditioner.embedders.1.model.positional_embedding",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.ln_final.bias",
    ],
)
def test_well_known_keys_of_the_published_file_are_there(sdxl: Header, key: str) -> None:
    assert key in sdxl.entries


def test_the_published_file_has_its_known_number_of_tensors(sdxl: Header) -> None:
    """2,515 tensors, of which two are constants: position_ids and logit_scale."""
    assert len(sdxl.entries) == 2_515 - 2
    assert sum(math.prod(entry.shape) for entry in sdxl.entries.values()) * 2 == pytest.approx(6.94e9, rel=1e-3)


def test_a_published_model_needs_no_configs_in_its_header() -> None:
    networks = {part: empty_network(SDXL, part, PUBLISHED[part]) for part in SDXL.components}
    tensors: dict[str, Planned] = {}
    for part, network in networks.items():
        tensors |= original_tensors(SDXL, part, changed_weights(part, network, None), torch.float16)
    parts = Components(
        SDXL, networks, tokenizers=(), scheduler_config=SCHEDULER, no_caption="empty-text", stored_dtypes={},
        tokenizer_sources=(),
    )  # fmt: skip
    assert configs_metadata(parts, Path("model.safetensors"), tensors) == {}
    parts = replace(parts, scheduler_config={**SCHEDULER, "beta_end": 0.02})
    assert "beta_end" in configs_metadata(parts, Path("model.safetensors"), tensors)["sdtrain.configs"]


@pytest.mark.parametrize("unet", [SSD_1B, VEGA], ids=["SSD-1B", "Segmind-Vega"])
def test_pruned_relatives_are_recognised(unet: dict[str, Any]) -> None:
    header = header_of(SDXL, {**PUBLISHED, "unet": unet})
    derived = config_of(header, SDXL, "unet")
    for key in ("mid_block_type", "block_out_channels", "attention_head_dim", "down_block_types", "up_block_types"):
        assert derived[key] == unet[key]
    again = empty_network(SDXL, "unet", derived)
    first = empty_network(SDXL, "unet", unet)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in first.named_parameters()}


def test_the_tiny_models_shape_is_recognised() -> None:
    from sdtrain.files.locations import BUILTIN_FOLDER
    from sdtrain.models.checkpoints.locate import read_json

    folder = BUILTIN_FOLDER / "tiny-sdxl"
    configs = {part: read_json(folder / part / "config.json") for part in SDXL.components}
    header = header_of(SDXL, configs)
    for part in SDXL.components:
        groups = {"norm_num_groups": configs[part]["norm_num_groups"]} if part in ("unet", "vae") else {}
        derived = empty_network(SDXL, part, {**config_of(header, SDXL, part), **groups})
        own = empty_network(SDXL, part, configs[part])
        assert {n: p.shape for n, p in derived.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
    assert config_of(header, SDXL, "unet")["addition_time_embed_dim"] == 32


def test_sd1_is_recognised() -> None:
    header = header_of(SD1, {**PUBLISHED, "unet": SD1_UNET})
    assert detect_family(header) == SD1
    derived = config_of(header, SD1, "unet")
    assert {key: derived[key] for key in SD1_UNET} == SD1_UNET
    assert config_of(header, SD1, "vae")["scaling_factor"] == 0.18215


@st.composite
def unets(draw: st.DrawFn) -> dict[str, Any]:
    """U-Nets as pruning leaves them: any depth in any layer of a block that attends, with or without a middle."""
    layers = draw(st.integers(1, 3))
    attends = [draw(st.booleans()), draw(st.booleans()), True]
    depth = st.integers(1, 3)
    down = [[draw(depth) for _ in range(layers)] if attend else 1 for attend in attends]
    up = [[draw(depth) for _ in range(layers + 1)] if attend else 1 for attend in reversed(attends)]
    pruned = draw(st.booleans())
    return {
        **SDXL_UNET,
        "block_out_channels": [64, 64, 128],
        "attention_head_dim": [1, 1, 2],
        "layers_per_block": layers,
        "cross_attention_dim": 16,
        "projection_class_embeddings_input_dim": OPEN_CLIP_G_TEXT["projection_dim"] + 6 * 8,
        "addition_time_embed_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "mid_block_type": "UNetMidBlock2D" if pruned else "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": up,
    }


@settings(max_examples=5, deadline=None)
@given(unets())
def test_any_pruned_unet_is_rebuilt_from_its_shapes(unet: dict[str, Any]) -> None:
    network = empty_network(SDXL, "unet", unet)
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    places = places_of(SDXL, "unet", shapes)
    assert len({place.key for place in places.values()}) == len(shapes)
    originals = {place.key.removeprefix("model.diffusion_model."): shapes[name] for name, place in places.items()}
    derived = unet_config(originals, SDXL, OPEN_CLIP_G_TEXT["projection_dim"])
    again = {name: tuple(value.shape) for name, value in empty_network(SDXL, "unet", derived).named_parameters()}
    assert again == shapes
    assert derived["addition_time_embed_dim"] == 8


@pytest.mark.parametrize("config", [SDXL_UNET, SSD_1B, VEGA, SD1_UNET], ids=["SDXL", "SSD-1B", "Vega", "SD 1.5"])
def test_the_names_of_a_single_files_unet_are_those_of_the_network(config: dict[str, Any]) -> None:
    """There and back, each layer once."""
    unet = empty_network(SDXL, "unet", config)
    layers = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    originals = original_unet_names(layers)
    assert set(originals) == set(layers) and len(set(originals.values())) == len(layers)
    assert own_unet_names(originals.values()) == {original: own for own, original in originals.items()}
