"""Dropouts, norms and weights of layers in whole runs: what is drawn is the step's, what is written keeps limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sdtrain.adapters.dropout import AdapterDropout
from sdtrain.adapters.kinds import delta
from sdtrain.adapters.norms import change_norm
from sdtrain.cli import app
from sdtrain.commands.notes import setting_notes
from sdtrain.config.read import resolve
from sdtrain.errors import UserError
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.training.computing.objective import Objective
from sdtrain.training.watching.preview import sampling_settings

SLOW = pytest.mark.slow
Train = Callable[..., tuple[Path, str]]
DROPS: dict[str, dict[str, Any]] = {
    "modules of loha": {"method.module_dropout": 0.4, "method.adapter": "loha"},
    "with text encoders": {
        "method.train": ["unet", "text_encoder", "text_encoder_2"],
        "method.dropout": 0.2,
        "method.rank_dropout": 0.2,
        "method.module_dropout": 0.2,
    },
    "norms": {"method.scale_weight_norms": 0.02, "optimizer.d0": 1e-2},
}
SMALL = {"data.resolution_px": 64, "data.batch_size": 1}
BASE: dict[str, Any] = {
    "name": "a",
    "steps": 1,
    "model": {"path": "builtin:tiny-sdxl"},
    "method": {"kind": "lora"},
    "data": {"folder": [{"path": "pictures"}]},
}


def bits(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "weights").glob("*.safetensors")))


def changes(run: Path) -> dict[str, torch.Tensor]:
    """dW of the U-Net's layers."""
    path = next((run / "weights").glob("*.safetensors"))
    return {name: delta(one, torch.zeros(())) for name, one in live(path).items()}


def live(path: Path) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    from sdtrain.adapters.formats.lora_file import read_lora
    from sdtrain.files.locations import BUILTIN_FOLDER

    unet = UNet2DConditionModel.from_pretrained(BUILTIN_FOLDER / "tiny-sdxl" / "unet")
    return dict(read_lora(path, {"unet": unet}).adapters["unet"])


def test_each_micro_batch_of_each_step_draws_its_own_masks(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    original = AdapterDropout.drawn

    def watched(self: AdapterDropout, generator: Callable[[int], torch.Generator], rows: list[tuple[int, int]]) -> Any:
        ((index, _),) = rows
        seeds.append(generator(index).initial_seed())
        return original(self, generator, rows)

    monkeypatch.setattr(AdapterDropout, "drawn", watched)
    train(SMALL | {"method.dropout": 0.1, "steps": 3, "data.batch_size": 1, "data.gradient_accumulation": 2})
    assert len(seeds) == len(set(seeds)) == 6


def test_a_picture_meets_the_same_masks_however_many_are_computed_at_once(train: Train) -> None:
    """A step that ran out of memory is done again with fewer pictures at once, and ranks share a step."""
    settings = SMALL | {"method.dropout": 0.3, "method.rank_dropout": 0.2, "method.module_dropout": 0.2, "steps": 3}
    settings |= {"data.batch_size": 4, "data.gradient_accumulation": 1, "optimizer.eps": 1e-4, "memory.on_oom": "adapt"}
    whole, _ = train(settings | {"name": "whole"})
    inputs, calls = Objective.inputs, 0

    def full(self: Objective, batch: Any, generator: Any) -> Any:
        nonlocal calls
        calls += 1
        if len(batch.examples) > 1 and calls > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs(self, batch, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "inputs", full)
        split, said = train(settings | {"name": "split"})
    assert "at most 1" in said or "one picture is computed at once" in said
    expected, found = weights(whole), weights(split)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-4), name


@pytest.mark.parametrize("method", ["with text encoders", "norms", pytest.param("modules of loha", marks=SLOW)])
def test_a_resumed_run_drops_and_scales_what_one_that_was_not_interrupted_does(train: Train, method: str) -> None:
    settings = SMALL | DROPS[method]
    straight, _ = train(settings | {"name": "straight", "steps": 3, "preview.every": 1})
    train(settings | {"name": "resumed", "steps": 2})
    resumed, _ = train(settings | {"name": "resumed", "steps": 3}, resume=True)
    assert bits(straight, 3) == bits(resumed, 3)


def test_masks_are_the_same_where_activations_are_computed_again(train: Train) -> None:
    settings = SMALL | {"method.dropout": 0.4, "method.rank_dropout": 0.2, "method.module_dropout": 0.2}
    settings |= {"method.train": ["unet", "text_encoder", "text_encoder_2"], "steps": 3}
    kept, _ = train(settings | {"name": "kept"})
    again, _ = train(settings | {"name": "again", "memory.gradient_checkpointing": True})
    expected, found = weights(kept), weights(again)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft"])
def test_no_kind_of_adapter_touches_the_global_generator(train: Train, kind: str) -> None:
    networks = ["unet"] if kind == "oft" else ["unet", "text_encoder", "text_encoder_2"]
    settings = {"method.adapter": kind, "method.train": networks, "export.names": "diffusers", "steps": 2}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(SMALL | settings | {"memory.gradient_checkpointing": True})
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["lora", pytest.param("loha", marks=SLOW), pytest.param("lokr", marks=SLOW)])
def test_exported_changes_keep_the_limit_and_it_was_needed(train: Train, kind: str) -> None:
    limit = 0.02
    settings = SMALL | {"method.adapter": kind, "optimizer.d0": 2e-2, "method.lr": {}, "steps": 6}
    free, _ = train(settings | {"name": "free"})
    held, _ = train(settings | {"name": "held", "method.scale_weight_norms": limit})
    unheld = [float(change_norm(one)) for one in live(free / "weights" / "free.safetensors").values()]
    norms = [float(change_norm(one)) for one in live(held / "weights" / "held.safetensors").values()]
    assert max(unheld) > 2 * limit
    assert max(norms) <= limit * 1.0001
    assert sum(norm > 0.5 * limit for norm in norms) > 3, "they are held at the limit, not put out"


def test_layers_move_by_their_weight_and_others_as_before(train: Train) -> None:
    """While d is the same: here it is given, and frozen from the first step on."""
    settings = SMALL | {"optimizer.d0": 1e-3, "optimizer.prodigy_steps": 1, "steps": 6}
    plain, _ = train(settings | {"name": "plain"})
    weighed, _ = train(settings | {"name": "weighed", "method.layer_weights": {"down_blocks.*": 0.25, "mid*": 0}})
    before, after = changes(plain), changes(weighed)
    assert {name for name in before if name not in after} == {name for name in before if name.startswith("mid_block")}
    ratios: dict[str, list[float]] = {"down_blocks": [], "up_blocks": []}
    for name, change in after.items():
        ratios[name.partition(".")[0]].append(float(change.norm() / before[name].norm()))
    mean = {name: sum(values) / len(values) for name, values in ratios.items()}
    assert mean["down_blocks"] == pytest.approx(0.25, rel=0.15)
    assert mean["up_blocks"] == pytest.approx(1.0, rel=0.15)


def test_a_full_fine_tune_freezes_the_layers_of_weight_zero(train: Train) -> None:
    full = {"kind": "full", "layer_weights": {"down_blocks.*": 0, "down_blocks.1*": 1}}
    run, _ = train(SMALL | {"method": full, "steps": 2, "export.dtype": "float32", "optimizer.d0": 1e-3})
    names = set(load_file(run / "checkpoints" / "step-000002" / "parameters.safetensors"))
    assert any(name.startswith("unet/down_blocks.1.") for name in names)
    assert not any(name.startswith(("unet/down_blocks.0.", "unet/down_blocks.2.")) for name in names)
    assert any(name.startswith("unet/up_blocks.") for name in names)


@pytest.mark.parametrize(
    ("changes_made", "told"),
    [
        ({"method.layer_weights": {"middle*": 0.5}}, "`middle\\*` matches no layer that is trained"),
        ({"method": {"kind": "full", "layer_weights": {"*": 0, "middle*": 0}}}, "are 0 for every layer of unet"),
        (
            {"method.adapter": "lokr", "method.rank": 512, "method.layer_weights": {"*to_q": 0.5}},
            "are 0.5 for .*to_q, but at rank 512 both of its Kronecker factors are whole",
        ),
    ],
)
def test_weights_that_cannot_be_are_refused_before_the_first_step(
    train: Train, changes_made: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        train(SMALL | changes_made)


def test_a_huber_schedule_reaches_the_loss(train: Train) -> None:
    constant, snr = (
        weights(train(SMALL | {"name": name, "loss.kind": "huber", "loss.huber_schedule": name, "steps": 1})[0])
        for name in ("constant", "snr")
    )
    assert any(not torch.equal(tensor, snr[name]) for name, tensor in constant.items())


def test_a_note_says_that_pure_noise_is_not_trained(train: Train) -> None:
    """The tiny model predicts v and has zero terminal SNR."""
    _, text = train(SMALL | {"steps": 1, "loss.weighting": "min_snr"})
    said = "gives timestep 999, pure noise under zero terminal SNR, the weight 0"
    assert said in text.replace("\n", " ")
    min_snr = {"loss": {"weighting": "min_snr"}}
    config = resolve(BASE | min_snr, "test")
    opened = open_model(config.model, "model")
    assert said in " ".join(setting_notes(config, opened))
    for changed in ({"timesteps": {"last": 998}}, {"loss": {"weighting": "debiased_kohya"}}, {"loss": {}}):
        assert setting_notes(resolve(BASE | min_snr | changed, "test"), opened) == []
    off = config.model_copy(update={"model": config.model.model_copy(update={"zero_terminal_snr": "off"})})
    assert setting_notes(off, opened) == []


def test_sample_hands_on_how_guidance_is_rescaled(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []
    monkeypatch.setattr("sdtrain.commands.sample.sample_to_files", lambda *given, **how: handed.append(given[4]))
    command = ["sample", "runs/a", "--prompt", "a cat", "--set", "preview.guidance_scale=4"]
    assert CliRunner().invoke(app, [*command, "--guidance-rescale", "0.7"]).exit_code == 0
    assert CliRunner().invoke(app, command).exit_code == 0
    assert handed == [["preview.guidance_scale=4", "preview.guidance_rescale=0.7"], ["preview.guidance_scale=4"]]
    assert CliRunner().invoke(app, [*command, "--guidance-rescale", "1.5"]).exit_code == 2
    config = resolve(BASE | {"preview": {"guidance_rescale": 0.7}}, "test")
    assert sampling_settings(config).guidance_rescale == 0.7
