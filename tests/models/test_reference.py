"""diffusers and transformers themselves read what is written, with nothing missing and nothing unexpected."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from sdtrain.families.modelspec import Description
from sdtrain.families.original_names import places_of
from sdtrain.families.sd import SD1
from sdtrain.families.sdxl import SDXL
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.models.checkpoints.components import Components
from sdtrain.models.checkpoints.folder import write_folder

TINY = BUILTIN_FOLDER / "tiny-sdxl"
DESCRIPTION = Description(title="tiny", resolution_px=(128, 128), date="2026-01-01T00:00:00Z")


def assert_same_parts(tiny: Components, pipeline: object) -> None:
    for component in SDXL.components:
        expected, got = tiny.networks[component].state_dict(), getattr(pipeline, component).state_dict()
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, got[name]), f"{component} {name}"


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the libraries warn about; their loggers do not propagate by default."""
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    yield caplog
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).removeHandler(caplog.handler)


def test_diffusers_reads_the_single_file(tiny: Components, single_file: Path, complaints) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(single_file), config=str(TINY), torch_dtype=torch.float32, local_files_only=True
    )
    assert_same_parts(tiny, pipeline)
    text = complaints.text
    assert "missing" not in text and "not used" not in text and "unexpected" not in text.lower(), text


def test_diffusers_reads_the_folder(tiny: Components, tmp_path: Path, complaints) -> None:
    from diffusers import StableDiffusionXLPipeline

    write_folder(tiny, tmp_path / "model", DESCRIPTION)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "model", torch_dtype=torch.float32, local_files_only=True
    )
    assert_same_parts(tiny, pipeline)
    assert (
        pipeline.scheduler.config.rescale_betas_zero_snr and pipeline.scheduler.config.prediction_type == "v_prediction"
    )
    assert pipeline.config.force_zeros_for_empty_prompt == (tiny.no_caption == "zeros")
    assert pipeline.tokenizer_2.pad_token == "!"
    assert pipeline.tokenizer("a red star").input_ids == tiny.tokenizers[0]("a red star").input_ids
    text = complaints.text
    assert "missing" not in text and "not used" not in text and "unexpected" not in text.lower(), text


def test_vae_attention_is_converted_as_diffusers_does() -> None:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    state = vae.state_dict()
    original = {}
    for name, place in places_of(SDXL, "vae", state).items():
        original[place.key] = state[name][..., None, None] if place.form == "convolution" else state[name]
    assert original["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    back = convert_ldm_vae_checkpoint(original, dict(vae.config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("linear", [True, False])
def test_unet_names_are_those_diffusers_converts(linear: bool) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, use_linear_projection=linear,
    )  # fmt: skip
    state = unet.state_dict()
    original = {place.key: state[name] for name, place in places_of(SD1, "unet", state).items()}
    assert len(original) == len(state)
    back = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
