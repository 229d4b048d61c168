"""The laws of the house, on the embedded model: what is looked at does not change, what is saved is the average."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Train = Callable[..., tuple[Path, str]]


def state_bits(run: Path, step: int) -> dict[str, bytes]:
    """Every file of a training state."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def weights_bits(run: Path) -> dict[str, bytes]:
    tensors = load_file(next((run / "weights").glob("*.safetensors")))
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora with text encoders": {"method.train": ["unet", "text_encoder", "text_encoder_2"]},
    "full": {"method": {"kind": "full", "train": ["unet"]}},
    "lora in bfloat16": {"model.dtype": "bfloat16"},
}


@pytest.mark.parametrize("method", METHODS)
def test_previews_do_not_change_the_training(train: Train, method: str) -> None:
    without, _ = train(METHODS[method] | {"name": "without"})
    with_previews, _ = train(METHODS[method] | {"name": "with", "preview.every": 1})
    assert len(list((with_previews / "previews").glob("*.png"))) == 5
    assert not (without / "previews").exists()
    assert state_bits(without, 4) == state_bits(with_previews, 4)
    assert weights_bits(without) == weights_bits(with_previews)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_one_that_was_not_interrupted(train: Train, method: str) -> None:
    straight, _ = train(METHODS[method] | {"name": "straight", "steps": 5})
    train(METHODS[method] | {"name": "resumed", "steps": 2})
    resumed, _ = train(METHODS[method] | {"name": "resumed", "steps": 5}, resume=True)
    assert state_bits(straight, 5) == state_bits(resumed, 5)
    assert weights_bits(straight) == weights_bits(resumed)
    losses = [
        [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (straight, resumed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_exported_weights_are_the_averaged_weights(train: Train) -> None:
    """x = y + (1 - 1/beta1)(z - y), from the saved state by hand, against the file."""
    run, _ = train({"method": {"kind": "full"}})
    folder = run / "checkpoints" / "step-000004"
    y = load_file(folder / "parameters.safetensors")
    state = load_file(folder / "optimizer.safetensors")
    exported = load_file(run / "weights" / "small.safetensors")
    moved = 0
    for index, name in enumerate(_in_order_of_the_network(list(y))):
        z = state[f"state.{index}.z"].double().view(y[name].shape)
        x = y[name].double() + (1 - 1 / 0.9) * (z - y[name].double())
        saved = exported[name.replace("unet/", "unet.")].double()
        assert torch.allclose(saved, x, rtol=0, atol=1e-6), name
        moved += not torch.allclose(saved, y[name].double(), rtol=0, atol=1e-6)
    assert moved > 100, "the average differs from the training weights, or this test shows nothing"


def _in_order_of_the_network(names: list[str]) -> list[str]:
    from diffusers import UNet2DConditionModel

    from sdtrain.models.inspect import builtin_folder

    network = UNet2DConditionModel.from_pretrained(builtin_folder() / "tiny-sdxl" / "unet")
    order = [f"unet/{name}" for name, _ in network.named_parameters()]
    assert sorted(order) == sorted(names)
    return order


def test_as_many_steps_are_done_as_were_asked_for(train: Train) -> None:
    run, _ = train({"steps": 7, "data.gradient_accumulation": 2, "preview.every": 3})
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 8))
    assert [path.name for path in sorted((run / "previews").iterdir())] == [
        f"step-{step:06d}.png" for step in (0, 3, 6, 7)
    ]


def test_the_global_random_generator_is_not_touched(train: Train) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train({"preview.every": 2})
    assert torch.equal(before, torch.get_rng_state())


def test_another_seed_is_another_run(train: Train) -> None:
    first, _ = train({"name": "first"})
    second, _ = train({"name": "second", "seed": 1})
    assert weights_bits(first) != weights_bits(second)
