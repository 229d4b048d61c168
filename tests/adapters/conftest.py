"""Random SDXL-shaped networks, small enough for a test, shaped enough to have every kind of block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

Networks = dict[str, nn.Module]


def build_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        norm_num_groups=8,
    )


def build_text_encoders() -> tuple[nn.Module, nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    ends = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
    first = CLIPTextConfig(hidden_size=32, intermediate_size=64, projection_dim=32, **sizes, **ends)
    second = CLIPTextConfig(hidden_size=32, intermediate_size=48, projection_dim=32, hidden_act="gelu", **sizes, **ends)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


@pytest.fixture(scope="session")
def make_networks() -> Callable[[], Networks]:
    """Fresh networks with the same random weights at each call."""

    def make() -> Networks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first, second = build_text_encoders()
            networks = {"unet": build_unet(), "text_encoder": first, "text_encoder_2": second}
        for network in networks.values():
            network.requires_grad_(False).eval()
        return networks

    return make


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small: on a busy machine threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
