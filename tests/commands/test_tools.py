"""What is done with a run's files afterwards: the same change dW comes out of every door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.commands.run_facts import finished_weights
from sdtrain.errors import UserError

Train = Callable[..., tuple[Path, str]]
BASE = "builtin:tiny-sdxl"
COMPONENTS = str(Path(__file__).parent.parent.parent / "sdtrain" / "builtin" / "tiny-sdxl")


def sdtrain(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def unet_weights(path: object, components: str = "") -> dict[str, torch.Tensor]:
    from sdtrain.commands.files.merge import read_base

    model, _ = read_base(str(path), components)
    return {name: tensor.float() for name, tensor in model.networks["unet"].state_dict().items()}


def test_every_format_of_a_run_holds_the_same_change(train: Train, tmp_path: Path) -> None:
    run, _ = train({"checkpoint.every": 2, "optimizer.d0": 1e-2})
    sdtrain("export", run, "--format", "sd-scripts", "--out", tmp_path / "again.safetensors")
    finished, again = load_file(run / "weights" / "small.safetensors"), load_file(tmp_path / "again.safetensors")
    assert finished.keys() == again.keys()
    assert all(torch.equal(finished[name], again[name]) for name in finished)
    sdtrain("export", run, "--format", "diffusers", "--out", tmp_path / "peft.safetensors")
    sdtrain("export", run, "--format", "single-file", "--out", tmp_path / "whole.safetensors")
    sdtrain("export", run, "--format", "folder", "--out", tmp_path / "folder")
    merged = {}
    for lora in ("again", "peft"):
        sdtrain("merge", BASE, tmp_path / f"{lora}.safetensors", "--out", tmp_path / f"m-{lora}.safetensors")
        merged[lora] = unet_weights(tmp_path / f"m-{lora}.safetensors", COMPONENTS)
    merged["single file"] = unet_weights(tmp_path / "whole.safetensors", COMPONENTS)
    merged["folder"] = unet_weights(tmp_path / "folder")
    base = unet_weights(BASE)
    changed = [name for name in base if not torch.equal(base[name], merged["again"][name])]
    assert len(changed) > 40
    for kind, weights in merged.items():
        for name in base:
            assert torch.allclose(weights[name], merged["again"][name], atol=1e-3), (kind, name)


def test_an_earlier_step_can_be_exported_and_a_missing_one_is_named(train: Train, tmp_path: Path) -> None:
    run, _ = train({"checkpoint.every": 2, "optimizer.d0": 1e-2})
    sdtrain("export", run, "--format", "sd-scripts", "--step", "2")
    earlier = load_file(run / "weights" / "small-sd-scripts-step-000002.safetensors")
    last = load_file(run / "weights" / "small.safetensors")
    assert any(not torch.equal(earlier[name], last[name]) for name in last)
    with pytest.raises(UserError, match="there are 2, 4"):
        sdtrain("export", run, "--format", "sd-scripts", "--step", "3")


def test_what_is_merged_can_be_extracted_and_resized(train: Train, tmp_path: Path) -> None:
    run, _ = train({"optimizer.d0": 1e-2, "method.targets": "attention"})
    lora, folder = run / "weights" / "small.safetensors", tmp_path / "merged"
    sdtrain("merge", BASE, lora, "--out", folder, "--layout", "folder", "--weight", "2")
    said = sdtrain(
        "extract", BASE, folder, "--out", tmp_path / "x.safetensors", "--rank", "2", "--targets", "attention"
    )
    assert "layers" in said
    sdtrain("resize", tmp_path / "x.safetensors", "--base", BASE, "--rank", "1", "--out", tmp_path / "r.safetensors")
    told = sdtrain("info", tmp_path / "r.safetensors")
    assert "ranks" in told
    sizes = {tensor.shape[0] for name, tensor in load_file(tmp_path / "r.safetensors").items() if "down" in name}
    assert sizes == {1}


def test_info_tells_what_a_run_wrote_into_its_file(train: Train) -> None:
    run, _ = train()
    told = sdtrain("info", run / "weights" / "small.safetensors")
    d = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["groups"]["unet"]["d"]
    for text in ("lora in sd-scripts names", "tiny-sdxl", "prediction  v", "a red thing number 1 (1)", f"unet {d:.2e}"):
        assert text in told, told


def test_a_run_can_start_from_an_earlier_file_and_its_d(train: Train) -> None:
    first, _ = train({"name": "first", "optimizer.d0": 2e-3})
    file = first / "weights" / "first.safetensors"
    changes = {"name": "second", "steps": 1, "checkpoint.every": 1, "optimizer.d_coef": 1.0}
    second, _ = train(changes | {"method.init_from": str(file)})
    before, after = load_file(file), load_file(second / "weights" / "second.safetensors")
    assert before.keys() == after.keys()
    up = [name for name in before if "lora_up" in name]
    assert all(torch.allclose(before[name], after[name], atol=0.02) for name in up)
    assert any(before[name].abs().max() > 1e-3 for name in up)
    log = (second / "log.jsonl").read_text()
    assert '"d": 0.002' in log


@pytest.mark.parametrize("adapter", ["rslora", "dora", "loha", "lokr", "oft"])
def test_every_kind_of_adapter_trains_and_is_written(train: Train, adapter: str) -> None:
    changes = {"steps": 2, "method.adapter": adapter, "method.rank": 4, "optimizer.d0": 1e-2}
    run, _ = train(changes)
    apart = adapter in ("dora", "oft")
    native = run / "weights" / f"small{'-native' if apart else ''}.safetensors"
    assert f"{adapter.removeprefix('rs')} in" in sdtrain("info", native)
    assert native.with_name("small-native.safetensors").exists() == apart
    assert apart <= ("lora in sd-scripts names" in sdtrain("info", run / "weights" / "small.safetensors"))
    sdtrain("sample", run, "--prompt", "a red circle", "--seed", "0", "--set", "preview.num_inference_steps=1")
    assert (run / "samples" / "grid.png").exists()


def test_a_dora_run_goes_on_from_what_was_trained_and_says_what_the_lora_misses(train: Train) -> None:
    changes = {"steps": 3, "method.adapter": "dora", "method.rank": 4, "optimizer.d0": 1e-2, "export.rank": 4}
    run, said = train(changes)
    assert "small.safetensors is a LoRA that misses" in said.replace("\n", " ")
    native = run / "weights" / "small-native.safetensors"
    assert finished_weights(run) == native, "samples show what was trained"
    again, _ = train(changes | {"name": "again", "method.init_from": str(native), "steps": 1})
    assert (again / "weights" / "again-native.safetensors").exists()


@pytest.mark.parametrize("form", ["native", "lora", "diff"])
def test_the_form_of_the_file_is_chosen(train: Train, form: str) -> None:
    run, _ = train({"steps": 1, "method.adapter": "loha", "export.form": form, "optimizer.d0": 1e-2})
    weights = run / "weights"
    kind = "loha" if form == "native" else form
    assert f"{kind} in sd-scripts names" in sdtrain("info", weights / "small.safetensors")
    assert (weights / "small-native.safetensors").exists() == (form != "native")


def test_a_stopped_text_encoder_stays_as_it_is(train: Train) -> None:
    both = {"method.train": ["unet", "text_encoder"], "checkpoint.every": 1, "checkpoint.keep": 9}
    run, _ = train(both | {"method.stop": {"text_encoder": 2}})
    states = [load_file(run / "checkpoints" / f"step-{step:06d}" / "parameters.safetensors") for step in (1, 2, 4)]
    text = [name for name in states[0] if name.startswith("text_encoder/") and "lora_A" in name]
    unet = [name for name in states[0] if name.startswith("unet/") and "lora_A" in name]
    assert all(torch.equal(states[1][name], states[2][name]) for name in text)
    assert not all(torch.equal(states[0][name], states[1][name]) for name in text)
    assert not all(torch.equal(states[1][name], states[2][name]) for name in unet)


def test_full_runs_are_sampled_from_the_checkpoint_they_wrote(train: Train) -> None:
    run, _ = train({"method": {"kind": "full", "train": ["unet", "text_encoder_2"]}, "steps": 2})
    sdtrain("sample", run, "--prompt", "a red circle", "--seed", "0", "--set", "preview.num_inference_steps=1")
    assert (run / "samples" / "prompt-00-seed-0.png").exists()
    assert "a red thing number 1 (1)" in sdtrain("info", run / "weights" / "small.safetensors")
    with pytest.raises(UserError, match="holds adapters, this run trains all weights"):
        sdtrain("export", run, "--format", "sd-scripts")
