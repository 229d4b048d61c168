"""The names of a file's layers, held against a table of SDXL's original layout that is spelled out here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from sdtrain.adapters.formats.layer_names import sd_scripts_names
from sdtrain.adapters.formats.lora_file import adapter_tensors
from sdtrain.adapters.kinds import LoraWeights
from sdtrain.adapters.targets import select_modules

# The original SDXL U-Net: which of its numbered blocks hold a transformer, and of how many layers.
TRANSFORMERS = {
    "input_blocks_4_1": 2,
    "input_blocks_5_1": 2,
    "input_blocks_7_1": 10,
    "input_blocks_8_1": 10,
    "middle_block_1": 10,
    "output_blocks_0_1": 10,
    "output_blocks_1_1": 10,
    "output_blocks_2_1": 10,
    "output_blocks_3_1": 2,
    "output_blocks_4_1": 2,
    "output_blocks_5_1": 2,
}
RESNETS = [
    *(f"input_blocks_{block}_0" for block in (1, 2, 4, 5, 7, 8)),
    "middle_block_0",
    "middle_block_2",
    *(f"output_blocks_{block}_0" for block in range(9)),
]
WITH_SHORTCUT = {"input_blocks_4_0", "input_blocks_7_0", *(f"output_blocks_{block}_0" for block in range(9))}
ATTENTION_LAYERS = [f"attn{n}_{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out_0")]


def spelled_out_attention_ff() -> Iterator[str]:
    for block, depth in TRANSFORMERS.items():
        yield f"lora_unet_{block}_proj_in"
        yield f"lora_unet_{block}_proj_out"
        for layer in range(depth):
            for part in (*ATTENTION_LAYERS, "ff_net_0_proj", "ff_net_2"):
                yield f"lora_unet_{block}_transformer_blocks_{layer}_{part}"


def spelled_out_rest() -> Iterator[str]:
    for block in RESNETS:
        parts = ["in_layers_2", "emb_layers_1", "out_layers_3"]
        for part in parts + ["skip_connection"] * (block in WITH_SHORTCUT):
            yield f"lora_unet_{block}_{part}"
    for name in ("input_blocks_0_0", "input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv"):
        yield f"lora_unet_{name}"
    for name in ("output_blocks_5_2_conv", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2", "out_2"):
        yield f"lora_unet_{name}"


def spelled_out_text(prefix: str, layers: int) -> Iterator[str]:
    for layer in range(layers):
        for part in (
            "self_attn_q_proj",
            "self_attn_k_proj",
            "self_attn_v_proj",
            "self_attn_out_proj",
            "mlp_fc1",
            "mlp_fc2",
        ):
            yield f"{prefix}_text_model_encoder_layers_{layer}_{part}"


def sdxl_unet() -> nn.Module:
    """Its published configuration, without memory for weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def sdxl_networks() -> dict[str, nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        first = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        )
    return {"unet": sdxl_unet(), "text_encoder": first, "text_encoder_2": second}


def test_every_name_of_true_size_sdxl_is_the_one_sd_scripts_writes() -> None:
    networks = sdxl_networks()
    names = sd_scripts_names(networks)
    targets = {component: select_modules(network, "attention+ff") for component, network in networks.items()}
    written = {component: [names[component][module] for module in modules] for component, modules in targets.items()}
    assert len(written["unet"]) == 722
    assert set(written["unet"]) == set(spelled_out_attention_ff())
    assert set(written["text_encoder"]) == set(spelled_out_text("lora_te1", 12))
    assert set(written["text_encoder_2"]) == set(spelled_out_text("lora_te2", 32))


def test_the_list_is_frozen() -> None:
    """The table above and the rule could be changed together; this could not."""
    names = [*spelled_out_attention_ff(), *spelled_out_text("lora_te1", 12), *spelled_out_text("lora_te2", 32)]
    assert len(names) == 722 + 72 + 192
    assert (
        hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
        == "1063b91c0a4164d0d184003241903ddb45ea2789384d465a17bbc942e6c871ff"
    )


def test_every_other_layer_of_the_sdxl_unet_has_its_original_name_too() -> None:
    network = sdxl_unet()
    names = sd_scripts_names({"unet": network})["unet"]
    assert {names[module] for module in select_modules(network, "all")} == {
        *spelled_out_attention_ff(),
        *spelled_out_rest(),
    }


def test_every_layer_is_written_with_up_down_and_alpha() -> None:
    networks = {"unet": sdxl_unet()}
    modules = select_modules(networks["unet"], "attention+ff")
    one = LoraWeights(torch.zeros(1, 2), torch.zeros(2, 1), alpha=1.0)
    keys = adapter_tensors({"unet": dict.fromkeys(modules, one)}, networks, "sd-scripts")
    assert set(keys) == {
        f"{name}.{part}"
        for name in spelled_out_attention_ff()
        for part in ("lora_up.weight", "lora_down.weight", "alpha")
    }


def test_smaller_relatives_are_counted_through_by_the_same_rule() -> None:
    """SSD-1B and Vega have a middle block without a transformer, and transformers of other depths in one block."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=((0, 0), (2, 2), (4, 4)),
            reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    names = sd_scripts_names({"unet": network})["unet"]
    written = {names[module] for module in select_modules(network, "attention+ff")}
    depths = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 4, "input_blocks_8_1": 4}
    depths |= {f"output_blocks_{block}_1": depth for block, depth in enumerate((4, 4, 10, 2, 1, 1))}
    assert written == {
        f"lora_unet_{block}_{part}"
        for block, depth in depths.items()
        for part in (
            "proj_in",
            "proj_out",
            *(
                f"transformer_blocks_{layer}_{inner}"
                for layer in range(depth)
                for inner in (*ATTENTION_LAYERS, "ff_net_0_proj", "ff_net_2")
            ),
        )
    }


def test_names_do_not_change_when_adapters_are_attached(make_networks: Callable[[], dict[str, nn.Module]]) -> None:
    from sdtrain.adapters.attach import AdapterSettings, attach_adapters

    networks = make_networks()
    before = sd_scripts_names(networks)
    for network in networks.values():
        modules = select_modules(network, "attention")
        attach_adapters(network, modules, AdapterSettings("lora", 2, 1.0), torch.Generator())
    assert sd_scripts_names(networks) == before


def test_no_two_layers_share_a_name(make_networks: Callable[[], dict[str, nn.Module]]) -> None:
    for networks in (make_networks(), sdxl_networks()):
        names = [name for modules in sd_scripts_names(networks).values() for name in modules.values()]
        assert len(set(names)) == len(names)
