"""A model's own word on its prediction and noise schedule is found, and contradictions are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sdtrain.config.schema import ModelConfig
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.models.checkpoints.inspect import inspect_model

BUILTIN = "builtin:tiny-sdxl"
EPSILON = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


@pytest.fixture
def components(tmp_path: Path) -> Path:
    """A folder that lends configs and tokenizers but says nothing of the noise schedule."""
    folder = shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl", tmp_path / "components")
    shutil.rmtree(folder / "scheduler")
    return folder


def without_markers(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("v_pred", None)
    tensors.pop("ztsnr", None)


def v_pred_only(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("ztsnr")


def ztsnr_only(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("v_pred")


def inspect(path: Path, components: Path, **settings: str):
    return inspect_model(ModelConfig(path=str(path), components=str(components), **settings))


@pytest.mark.parametrize(
    ("change", "metadata", "prediction", "zero"),
    [
        (None, {}, "v_prediction", True),
        (v_pred_only, {}, "v_prediction", False),
        (without_markers, {}, "epsilon", False),
        (without_markers, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        (without_markers, {"modelspec.predict_key": "v"}, "v_prediction", False),
        (without_markers, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    ],
)
def test_markers_are_found(rewrite, components: Path, change, metadata, prediction: str, zero: bool) -> None:
    facts, problems = inspect(rewrite(change or (lambda tensors: None), metadata=metadata), components)
    assert not problems
    assert (facts.prediction, facts.zero_terminal_snr) == (prediction, zero)


def test_epsilon_against_a_v_pred_key_is_refused(rewrite, components: Path) -> None:
    path = rewrite(v_pred_only, metadata={})
    _, problems = inspect(path, components, prediction="epsilon")
    assert [problem.where for problem in problems] == ["model.prediction"]
    assert "v_prediction (v_pred)" in problems[0].what


def test_v_prediction_against_modelspec_is_refused(rewrite, components: Path) -> None:
    path = rewrite(without_markers, metadata={"modelspec.prediction_type": "epsilon"})
    _, problems = inspect(path, components, prediction="v_prediction")
    assert "epsilon (modelspec.prediction_type)" in problems[0].what


def test_a_model_that_says_nothing_leaves_it_to_the_user(rewrite, components: Path) -> None:
    path = rewrite(without_markers, metadata={})
    _, problems = inspect(path, components, prediction="v_prediction", zero_terminal_snr="on")
    assert not problems


def test_zero_terminal_snr_off_against_the_key_is_refused(rewrite, components: Path) -> None:
    path = rewrite(lambda tensors: None, metadata={})
    _, problems = inspect(path, components, zero_terminal_snr="off")
    assert [problem.where for problem in problems] == ["model.zero_terminal_snr"] and "ztsnr" in problems[0].what


def test_zero_terminal_snr_with_epsilon_is_refused(rewrite, components: Path) -> None:
    _, problems = inspect(rewrite(ztsnr_only, metadata={}), components)
    assert [problem.where for problem in problems] == ["model.prediction"] and "nothing to learn" in problems[0].what
    path = rewrite(without_markers, metadata={}, name="silent.safetensors")
    _, problems = inspect(path, components, zero_terminal_snr="on")
    assert [problem.where for problem in problems] == ["model.zero_terminal_snr"]


def test_a_folders_scheduler_counts(tmp_path: Path) -> None:
    folder = shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl", tmp_path / "model")
    _, problems = inspect_model(ModelConfig(path=str(folder), prediction="epsilon"))
    assert "scheduler_config.json: prediction_type" in problems[0].what
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **EPSILON}))
    facts, problems = inspect_model(ModelConfig(path=str(folder)))
    assert facts.prediction == "epsilon" and not problems
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
    _, problems = inspect_model(ModelConfig(path=str(folder)))
    assert "prediction_type is sample" in problems[0].what


def test_the_schedule_of_a_file_is_sampled_from_pure_noise(rewrite, components: Path) -> None:
    from sdtrain.models.checkpoints.locate import open_checkpoint
    from sdtrain.models.checkpoints.markers import scheduler_of

    scheduler = scheduler_of(open_checkpoint(rewrite(lambda tensors: None, metadata={}), ""), None)
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] and scheduler["timestep_spacing"] == "trailing"
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
