"""diffusers' own loader computes the dW that was in memory, from both namings, with nothing missing or unexpected."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

import sdtrain
from sdtrain.adapters.formats.conventions import Names
from sdtrain.adapters.formats.lora_file import write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import Adapters, LoraWeights
from sdtrain.adapters.targets import select_modules
from sdtrain.files.header import read_header

MakeNetworks = Callable[[], dict[str, nn.Module]]
FACTS = FileFacts(title="test", date="2026-11-22T15:00:00+00:00")
RANKS_AND_ALPHAS = {
    "alpha is rank": [(4, 4.0)],
    "alpha is not rank": [(4, 3.0)],
    "mixed ranks": [(4, 8.0), (6, 8.0), (2, 8.0)],
    "mixed ranks and alphas": [(4, 1.0), (6, 2.5), (2, 8.0), (4, 8.0)],
}


def random_lora(
    networks: dict[str, nn.Module], pairs: list[tuple[int, float]], targets: str = "attention+ff"
) -> Adapters:
    generator = torch.Generator().manual_seed(1)
    found: dict[str, dict[str, LoraWeights]] = {}
    for component, network in networks.items():
        found[component] = {}
        for index, module in enumerate(select_modules(network, targets)):
            rank, alpha = pairs[index % len(pairs)]
            shape = network.get_submodule(module).weight.shape
            down = torch.randn(rank, *shape[1:], generator=generator)
            up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
            found[component][module] = LoraWeights(down, up * 0.02, alpha)
    return found


def pipeline(networks: dict[str, nn.Module]):
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return StableDiffusionXLPipeline(
        vae=vae, tokenizer=None, tokenizer_2=None, scheduler=EulerDiscreteScheduler(), **networks
    )


def assert_same_deltas(networks: dict[str, nn.Module], adapters: Adapters) -> None:
    for component, modules in adapters.items():
        loaded = {n: m for n, m in networks[component].named_modules() if hasattr(m, "lora_A")}
        assert set(loaded) == set(modules)
        for module, weights in modules.items():
            wanted = weights.delta()
            found = loaded[module].get_delta_weight("default_0").detach()
            assert (found - wanted).norm() <= 1e-3 * wanted.norm(), module


@pytest.mark.parametrize("names", ["sd-scripts", "diffusers"])
@pytest.mark.parametrize("case", RANKS_AND_ALPHAS)
def test_diffusers_computes_the_same_delta(
    make_networks: MakeNetworks, tmp_path: Path, case: str, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    networks = make_networks()
    adapters = random_lora(networks, RANKS_AND_ALPHAS[case])
    write_lora(tmp_path / "a.safetensors", adapters, networks, names=names, facts=FACTS)
    pipe = pipeline(networks)
    diffusers.utils.logging.enable_propagation()  # or no one hears of keys that are missing or unexpected
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # peft's word for settings that match nothing
            pipe.load_lora_weights(tmp_path / "a.safetensors")
    finally:
        diffusers.utils.logging.disable_propagation()
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [record.message for record in loud if record.name.startswith("diffusers")]
    assert_same_deltas(networks, adapters)


@pytest.mark.parametrize("names", ["sd-scripts", "diffusers"])
def test_diffusers_reads_convolutions_and_embeddings(make_networks: MakeNetworks, tmp_path: Path, names: Names) -> None:
    networks = {"unet": make_networks()["unet"]}
    adapters = random_lora(networks, [(4, 2.0), (3, 2.0)], "all")
    write_lora(tmp_path / "a.safetensors", adapters, networks, names=names, facts=FACTS)
    rest = make_networks() | networks
    pipeline(rest).load_lora_weights(tmp_path / "a.safetensors")
    assert_same_deltas(networks, adapters)


@pytest.mark.parametrize("names", ["sd-scripts", "diffusers"])
def test_diffusers_reads_a_lora_of_sd_1(tmp_path: Path, names: Names) -> None:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    ends = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
    text = CLIPTextConfig(
        vocab_size=100, num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64, **ends
    )
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    networks = {"unet": unet, "text_encoder": CLIPTextModel(text)}
    adapters = random_lora(networks, [(4, 2.0), (2, 2.0)])
    write_lora(tmp_path / "a.safetensors", adapters, networks, names=names, facts=FACTS)
    assert read_header(tmp_path / "a.safetensors").metadata["ss_base_model_version"] == "sd_v1"
    StableDiffusionPipeline(
        vae=AutoencoderKL(),
        tokenizer=None,
        scheduler=EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **networks,
    ).load_lora_weights(tmp_path / "a.safetensors")
    assert_same_deltas(networks, adapters)


def test_the_embedded_model_makes_other_pictures_with_a_lora(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder = Path(sdtrain.__file__).parent / "builtin" / "tiny-sdxl"
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    networks = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2")}

    def picture() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_inference_steps": 2}
        return pipe("a red circle", generator=generator, output_type="pt", **size).images

    before = picture()
    adapters = random_lora(networks, [(4, 3.0), (8, 3.0)])
    write_lora(tmp_path / "a.safetensors", adapters, networks, names="sd-scripts", facts=FACTS)
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    assert_same_deltas(networks, adapters)
    after = picture()
    assert after.isfinite().all()
    assert not torch.allclose(before, after)
