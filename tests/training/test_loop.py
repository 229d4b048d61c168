"""The loop under memory levers, broken losses and repeated interruptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdtrain.errors import UserError
from sdtrain.training.computing.objective import Objective

BUILTIN = Path(__file__).parent.parent.parent / "sdtrain" / "builtin" / "tiny-sdxl"
Train = Callable[..., tuple[Path, str]]


def tensors(run: Path, name: str = "small") -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / f"{name}.safetensors")


def test_recomputed_activations_change_nothing_but_memory(train: Train) -> None:
    networks = {"method.train": ["unet", "text_encoder", "text_encoder_2"]}
    plain, _ = train(networks | {"name": "plain"})
    expected = tensors(plain, "plain")
    for settings in ({"memory.gradient_checkpointing": True}, {"memory.recompute": ["mid_block", "up_blocks.0"]}):
        recomputed, _ = train(networks | {"name": "recomputed", **settings})
        found = tensors(recomputed, "recomputed")
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-6), (name, settings)
        shutil.rmtree(recomputed)


def test_a_part_that_the_network_has_not_is_refused_with_those_it_has(train: Train) -> None:
    with pytest.raises(UserError, match=r"memory.recompute.*no up_blocks.7; it has down_blocks.0, .*up_blocks.1"):
        train({"memory.recompute": ["up_blocks.7"]})


def test_a_fused_backward_trains_the_same(train: Train) -> None:
    full = {"method": {"kind": "full"}, "export.dtype": "float32"}
    plain, _ = train(full | {"name": "plain"})
    fused, _ = train(full | {"name": "fused", "memory.fused_back_pass": True})
    expected, found = tensors(plain, "plain"), tensors(fused, "fused")
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


def test_a_step_whose_loss_is_not_finite_changes_nothing_and_names_the_pictures(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    train({"steps": 2, "checkpoint.every": 1, "checkpoint.keep": 9})
    original = Objective.__call__

    def broken(self: Objective, batch: object, generator: object) -> torch.Tensor:
        return original(self, batch, generator) * float("nan")  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "__call__", broken)
    run, text = train({"steps": 3, "checkpoint.every": 1, "checkpoint.keep": 9}, resume=True)
    before = load_file(run / "checkpoints" / "step-000002" / "parameters.safetensors")
    after = load_file(run / "checkpoints" / "step-000003" / "parameters.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "nothing was changed; pictures in this step:" in text
    assert ".png" in text
    lines = [line for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]
    assert json.loads(lines[-1])["loss"] is None


def test_five_broken_steps_in_a_row_stop_the_run_with_the_last_state_whole(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    train({"steps": 1})
    original = Objective.__call__
    monkeypatch.setattr(
        Objective,
        "__call__",
        lambda self, batch, generator: original(self, batch, generator) * float("nan"),
    )
    with pytest.raises(UserError, match="5 times in a row"):
        train({"steps": 50}, resume=True)
    monkeypatch.undo()
    run, _ = train({"steps": 7}, resume=True)
    assert (run / "checkpoints" / "step-000007" / "state.json").exists()


def test_old_states_go_and_the_newest_stay(train: Train) -> None:
    run, _ = train({"steps": 5, "checkpoint.every": 1, "checkpoint.keep": 2})
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_an_unfinished_state_is_not_taken_for_one(train: Train) -> None:
    run, _ = train({"steps": 2})
    unfinished = run / "checkpoints" / ".step-000009.partial"
    unfinished.mkdir()
    (unfinished / "parameters.safetensors").write_bytes(b"half")
    train({"steps": 3}, resume=True)
    assert [
        json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line
    ] == [1, 2, 3]


def test_a_file_that_would_do_nothing_is_not_written(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Objective.__call__
    monkeypatch.setattr(Objective, "__call__", lambda self, batch, generator: 0.0 * original(self, batch, generator))
    with pytest.raises(UserError, match="every up matrix is zero"):
        train({"steps": 2})


def test_text_encoders_are_groups_of_their_own(train: Train) -> None:
    changes = {"method.train": ["unet", "text_encoder", "text_encoder_2"], "method.lr": {"text_encoder": 0.5}}
    run, text = train(changes | {"optimizer.prodigy_steps": 1})  # a weight holds once d is found, or fixed
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert list(last["groups"]) == ["unet", "text_encoder", "text_encoder_2"]
    rates = {name: group["effective_lr"] for name, group in last["groups"].items()}
    assert rates["text_encoder"] == pytest.approx(0.5 * rates["unet"], rel=1e-3)
    assert "text_encoder_2" in text
    names = load_file(run / "weights" / "small.safetensors")
    assert any(name.startswith("lora_te1_") for name in names)
    assert any(name.startswith("lora_te2_") for name in names)


def test_a_target_that_matches_nothing_is_refused_before_anything_is_written(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="matches no layer"):
        train({"method.targets": ["*.nothing"]})
    assert not (tmp_path / "runs" / "small").exists()


def test_a_model_that_predicts_epsilon_trains_the_same_way(train: Train, tmp_path: Path) -> None:
    model = tmp_path / "epsilon"
    shutil.copytree(BUILTIN, model)
    scheduler = model / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text()) | {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    scheduler.write_text(json.dumps(settings))
    known = {"data.folder": [{"path": "builtin:quickstart-known"}]}
    epsilon, _ = train(known | {"name": "epsilon", "model.path": str(model), "preview.every": 4})
    v, _ = train(known | {"name": "v"})
    first = [json.loads((run / "log.jsonl").read_text().splitlines()[0])["loss"] for run in (epsilon, v)]
    assert first[0] > 2 * first[1], "a v model is a bad epsilon model, so the target really is another"


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights(train: Train) -> None:
    full = {"method": {"kind": "full"}, "export.dtype": "float32"}
    plain, _ = train(full | {"name": "plain"})
    mixed, _ = train(full | {"name": "mixed", "model.dtype": "mixed"})
    losses = [json.loads((run / "log.jsonl").read_text().splitlines()[0])["loss"] for run in (plain, mixed)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    state = load_file(mixed / "checkpoints" / "step-000004" / "parameters.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


@pytest.mark.slow
def test_compiled_blocks_train_the_same(train: Train) -> None:
    """By the losses: an update that only reads the gradient's sign tips where a gradient is all but zero."""
    plain, _ = train({"name": "plain"})
    compiled, _ = train({"name": "compiled", "memory.compile": True})
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert losses(compiled) != losses(plain), "nothing was compiled, or this test shows nothing"
