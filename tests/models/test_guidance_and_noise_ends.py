"""Rescaled guidance and zero terminal SNR in pictures and in exported folders, against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

from sdtrain.config.schema import ModelConfig
from sdtrain.diffusion.words import Sampler
from sdtrain.families.modelspec import Description
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.models.latent_diffusion import resolved_scheduler
from sdtrain.models.load import load_model
from sdtrain.models.model import Model, SamplingSettings
from sdtrain.models.sampling import sample

LEADING = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def tiny_model(**settings: str) -> Model:
    config = ModelConfig(path="builtin:tiny-sdxl", **settings)  # type: ignore[arg-type]
    return load_model(open_model(config, "model"), config, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_pictures_with_rescaled_guidance_are_those_of_diffusers_pipeline(rescale: float) -> None:
    model = tiny_model()
    settings = SamplingSettings(4, guidance_scale=6.0, width_px=64, height_px=64, guidance_rescale=rescale)
    texts = [model.encode_captions(["a red star"]), model.encode_captions([""])]
    pictures = sample(model, *texts, [torch.Generator().manual_seed(1)], settings)
    pipeline = StableDiffusionXLPipeline.from_pretrained(BUILTIN_FOLDER / "tiny-sdxl", local_files_only=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red star", negative_prompt="", num_inference_steps=4, guidance_scale=6.0, guidance_rescale=rescale,
        width=64, height=64, output_type="pt", generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    assert torch.allclose((pictures + 1) / 2, expected, atol=1e-3)
    if rescale:
        plain = sample(model, *texts, [torch.Generator().manual_seed(1)], SamplingSettings(4, 6.0, 64, 64))
        assert (plain - pictures).abs().max() > 0.05, "the rescaling is seen, or this test shows nothing"


SAMPLERS: dict[Sampler, Any] = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
}


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_pictures_of_every_sampler_are_those_of_diffusers_pipeline(sampler: Sampler) -> None:
    model = tiny_model()
    settings = SamplingSettings(6, guidance_scale=2.0, width_px=64, height_px=64, sampler=sampler)
    texts = [model.encode_captions(["a red star"]), model.encode_captions([""])]
    pictures = sample(model, *texts, [torch.Generator().manual_seed(1)], settings)
    pipeline = StableDiffusionXLPipeline.from_pretrained(BUILTIN_FOLDER / "tiny-sdxl", local_files_only=True)
    scheduler, how = SAMPLERS[sampler]
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **how)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red star", negative_prompt="", num_inference_steps=6, guidance_scale=2.0,
        width=64, height=64, output_type="pt", generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    assert torch.allclose((pictures + 1) / 2, expected, atol=1e-3)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_picture_does_not_depend_on_its_neighbours(sampler: Sampler) -> None:
    model = tiny_model()
    settings = SamplingSettings(3, guidance_scale=2.0, width_px=64, height_px=64, sampler=sampler)
    texts = [model.encode_captions(["a red star"] * 2), model.encode_captions([""] * 2)]
    both = sample(model, *texts, [torch.Generator().manual_seed(seed) for seed in (1, 2)], settings)
    alone = [{key: value[:1] for key, value in one.items()} for one in texts]
    for index, seed in enumerate((1, 2)):
        one = sample(model, *alone, [torch.Generator().manual_seed(seed)], settings)
        assert torch.allclose(one[0], both[index], atol=1e-4)


def test_a_picture_without_guidance_knows_no_rescaling() -> None:
    model = tiny_model()
    texts = [model.encode_captions(["a red star"]), model.encode_captions([""])]
    plain, rescaled = (
        sample(model, *texts, [torch.Generator().manual_seed(1)], SamplingSettings(2, 1.0, 64, 64, share))
        for share in (0.0, 0.7)
    )
    assert torch.equal(plain, rescaled)


def test_zero_terminal_snr_that_is_switched_on_samples_from_pure_noise() -> None:
    on = resolved_scheduler(LEADING, ModelConfig(path="", zero_terminal_snr="on"))
    scheduler = EulerDiscreteScheduler.from_config(on)
    scheduler.set_timesteps(25)
    assert float(scheduler.timesteps[0]) == 999
    assert float(scheduler.sigmas[0]) > 1000
    assert resolved_scheduler(LEADING, ModelConfig(path="")) == LEADING, "auto is what the model says"
    assert resolved_scheduler(LEADING, ModelConfig(path="", zero_terminal_snr="off")) == LEADING


def test_an_exported_folder_samples_from_pure_noise_where_the_run_was_told_so(tmp_path: Path) -> None:
    """The folder's model says nothing of it; only the user does."""
    from sdtrain.models.checkpoints.components import load_components
    from sdtrain.models.checkpoints.folder import write_folder

    config = ModelConfig(path="builtin:tiny-sdxl")
    parts = load_components(open_model(config, "model"), torch.float32)
    parts.scheduler_config.clear()  # type: ignore[attr-defined]
    parts.scheduler_config.update(LEADING)  # type: ignore[attr-defined]
    description = Description(title="tiny", resolution_px=(64, 64), date="2026-01-01T00:00:00Z")
    write_folder(parts, tmp_path / "base", description)
    told = ModelConfig(path=str(tmp_path / "base"), zero_terminal_snr="on")
    model = load_model(open_model(told, "model"), told, device=torch.device("cpu"), dtype=torch.float32)
    model.write_checkpoint(tmp_path / "out", description, layout="folder")
    written = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (written["rescale_betas_zero_snr"], written["timestep_spacing"]) == (True, "trailing")
    again = ModelConfig(path=str(tmp_path / "out"))
    assert open_model(again, "model").scheduler == written
