"""SD 1.x and 2.x behind the same contract as SDXL, on small random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdtrain.config.schema import ModelConfig
from sdtrain.errors import UserError
from sdtrain.families.known import FAMILIES
from sdtrain.families.modelspec import Description
from sdtrain.families.published_configs import SCHEDULER
from sdtrain.families.sd import SD2
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.folder import write_folder
from sdtrain.models.checkpoints.inspect import inspect_model, open_model
from sdtrain.models.checkpoints.single_file import write_single_file
from sdtrain.models.checkpoints.tokenizers import TokenizerSource, load_tokenizer
from sdtrain.models.load import load_model
from sdtrain.models.model import Model, SamplingSettings
from sdtrain.models.sampling import sample
from sdtrain.models.sd import SD
from sdtrain.models.sdxl import SDXL

DESCRIPTION = Description(title="small", resolution_px=(64, 64), date="2026-01-01T00:00:00Z")
TOKENIZER = TokenizerSource(BUILTIN_FOLDER / "tiny-sdxl" / "tokenizer")
CPU = torch.device("cpu")


def small_sd(family: Any) -> Components:
    """Random networks with the family's blocks: four levels, the last without attention."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=2, use_linear_projection=family == "sd2",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    words = len(load_tokenizer(TOKENIZER).get_vocab())
    text = CLIPTextConfig(
        vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=words - 2, eos_token_id=words - 1,
    )  # fmt: skip
    networks = {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": CLIPTextModel(text).eval()}
    return Components(
        family=FAMILIES[family], networks=networks, tokenizers=(load_tokenizer(TOKENIZER),),
        scheduler_config=dict(SCHEDULER), no_caption="empty-text", tokenizer_sources=(TOKENIZER,),
        stored_dtypes=dict.fromkeys(networks, torch.float32),
    )  # fmt: skip


def read_model(config: ModelConfig) -> Model:
    return load_model(open_model(config, "model"), config, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd") / request.param
    write_folder(small_sd(request.param), path, DESCRIPTION)
    return path


def assert_same(one: Components, other: Components) -> None:
    for component in ("unet", "vae", "text_encoder"):
        left, right = one.networks[component].state_dict(), other.networks[component].state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_family_is_found_and_fulfils_the_contract(folder: Path) -> None:
    model: Model = read_model(ModelConfig(path=str(folder)))
    assert isinstance(model, SD) and model.components.family.name == folder.name
    assert set(model.networks) == {"unet", "text_encoder"} and model.latent_shape == (4, 8)
    conditioning = model.encode_captions(["a red star", "a blue ring"])
    assert conditioning["prompt_embeds"].shape == (2, 77, 32)
    latents = model.encode_pixels(torch.zeros(2, 3, 64, 64))
    steps = torch.tensor([3, 900])
    prediction = model.predict(latents, steps, {**conditioning, **model.encode_sizes(torch.zeros(2, 6))})
    assert prediction.shape == latents.shape == (2, 4, 8, 8)
    assert [len(part) > 0 for part in model.fingerprints()] == [True, True]


def test_a_check_knows_the_family_and_its_networks(folder: Path) -> None:
    facts, problems = inspect_model(ModelConfig(path=str(folder)))
    assert not problems and facts.family.name == folder.name
    assert facts.family.trainable == ("unet", "text_encoder") and facts.latent_step_px == 64
    assert inspect_model(ModelConfig(path="builtin:tiny-sdxl"))[0].family.trainable == (
        "unet",
        "text_encoder",
        "text_encoder_2",
    )


def test_pictures_are_those_of_diffusers_pipeline(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    model = read_model(ModelConfig(path=str(folder)))
    settings = SamplingSettings(num_inference_steps=3, guidance_scale=4.0, width_px=64, height_px=64)
    texts = [model.encode_captions(["a red star"]), model.encode_captions([""])]
    pictures = sample(model, *texts, [torch.Generator().manual_seed(1)], settings)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red star", num_inference_steps=3, guidance_scale=4.0, width=64, height=64, output_type="pt",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    assert torch.allclose((pictures + 1) / 2, expected, atol=2e-4)


def test_a_folder_comes_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    read = load_components(open_model(ModelConfig(path=str(folder)), "model"), torch.float32)
    assert_same(read, small_sd(folder.name))
    write_folder(read, tmp_path / "again", DESCRIPTION)
    assert_same(load_components(open_model(ModelConfig(path=str(tmp_path / "again")), "model"), torch.float32), read)
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_sd1_goes_through_a_single_file(tmp_path: Path) -> None:
    parts = small_sd("sd1")
    write_single_file(parts, tmp_path / "sd1.safetensors", DESCRIPTION)
    names = set(load_file(tmp_path / "sd1.safetensors"))
    assert "cond_stage_model.transformer.text_model.embeddings.position_ids" in names
    assert "model.diffusion_model.middle_block.1.proj_in.weight" in names
    config = ModelConfig(path=str(tmp_path / "sd1.safetensors"), components=str(TOKENIZER.folder))
    model = read_model(config)
    assert isinstance(model, SD)
    assert_same(model.components, parts)


def test_sd2_is_written_as_a_folder_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffusers folder instead"):
        write_single_file(small_sd("sd2"), tmp_path / "sd2.safetensors", DESCRIPTION)
    assert list(tmp_path.iterdir()) == []


def test_an_sdxl_model_gets_its_own_family() -> None:
    model = read_model(ModelConfig(path="builtin:tiny-sdxl"))
    assert isinstance(model, SDXL)


def test_sd2_of_another_tool_loses_only_the_layer_nobody_reads(tmp_path: Path) -> None:
    """OpenCLIP's layout with one layer more than is read, fused projections and a pooled projection."""
    from safetensors.torch import save_file

    from sdtrain.models.checkpoints.single_file import changed_weights, original_tensors

    parts = small_sd("sd2")
    tensors: dict[str, torch.Tensor] = {}
    for component in SD2.components:
        weights = changed_weights(component, parts.networks[component], None)
        planned = original_tensors(SD2, component, weights, torch.float32)
        tensors |= {key: tensor.values().detach().contiguous() for key, tensor in planned.items()}
    prefix = "cond_stage_model.model."
    last = {
        name.replace("resblocks.1.", "resblocks.2."): value.clone() + 1
        for name, value in tensors.items()
        if name.startswith(prefix + "transformer.resblocks.1.")
    }
    more = {prefix + "text_projection": torch.zeros(32, 32), prefix + "logit_scale": torch.zeros(())}
    save_file({**tensors, **last, **more}, tmp_path / "sd2.safetensors")
    folder = shutil.copytree(TOKENIZER.folder, tmp_path / "components" / "tokenizer").parent
    write_folder(parts, tmp_path / "configs", DESCRIPTION)
    for part in SD2.components:
        (folder / part).mkdir()
        shutil.copy(tmp_path / "configs" / part / "config.json", folder / part)
    config = ModelConfig(path=str(tmp_path / "sd2.safetensors"), components=str(folder))
    assert_same(load_components(open_model(config, "model"), torch.float32), parts)
