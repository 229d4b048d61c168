"""The laws of the house, on the embedded model: what is looked at does not change, what is saved is the average."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

BUILTIN = Path(__file__).parent.parent / "sdtrain" / "builtin"
Train = Callable[..., tuple[Path, str]]


def state_bits(run: Path, step: int) -> dict[str, bytes]:
    """Every file of a training state but the settings, which name the run, and the index, which has their digest."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    names = {path.name for path in folder.iterdir()}
    assert names == {"parameters.safetensors", "optimizer.safetensors", "pictures.json", "config.toml", "state.json"}
    return {name: (folder / name).read_bytes() for name in names - {"config.toml", "state.json"}}


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


def averaged_by_hand(run: Path, step: int, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """x = y + (1 - 1/beta1)(z - y) of a saved state, and y; `names` in the order the optimizer got the parameters."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    y = load_file(folder / "parameters.safetensors")
    state = load_file(folder / "optimizer.safetensors")
    assert sorted(names) == sorted(y)
    x = {}
    for index, name in enumerate(names):
        z = state[f"state.{index}.z"].double().view(y[name].shape)
        x[name] = y[name].double() + (1 - 1 / 0.9) * (z - y[name].double())
    return x, y


def require_average(exported: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Asserts that x was exported; whether that can be told from y."""
    assert torch.allclose(exported.double(), x, rtol=0, atol=1e-6)
    return not torch.allclose(exported.double(), y.double(), rtol=0, atol=1e-6)


def tiny_unet() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(BUILTIN / "tiny-sdxl" / "unet")
    assert isinstance(network, torch.nn.Module)
    return network


def test_an_exported_lora_holds_the_averaged_weights(train: Train) -> None:
    from sdtrain.adapters.attach import AdapterSettings, attach_adapters
    from sdtrain.adapters.targets import select_modules

    run, _ = train({"export.names": "diffusers", "method.alpha": 2.0})
    saved = load_file(run / "weights" / "small.safetensors")
    network = tiny_unet()
    modules = select_modules(network, "attention")
    parameters = attach_adapters(network, modules, AdapterSettings("lora", 2, 2.0), torch.Generator())
    x, y = averaged_by_hand(run, 4, [f"unet/{name}" for name in parameters])
    moved = 0
    for name in parameters:
        exported = saved[f"unet.{name.replace('.default', '')}"]
        moved += require_average(exported, x[f"unet/{name}"], y[f"unet/{name}"])
    assert len(saved) == len(parameters)
    assert moved > 20, "the average differs from the training weights, or this test shows nothing"


def test_an_exported_checkpoint_holds_the_averaged_weights(train: Train) -> None:
    from sdtrain.families.original_names import places_of
    from sdtrain.families.sdxl import SDXL

    run, _ = train({"method": {"kind": "full"}, "export.dtype": "float32"})
    saved = load_file(run / "weights" / "small.safetensors")
    names = [name for name, _ in tiny_unet().named_parameters()]
    x, y = averaged_by_hand(run, 4, [f"unet/{name}" for name in names])
    moved = 0
    for name, place in places_of(SDXL, "unet", names).items():
        exported = saved[place.key].view(y[f"unet/{name}"].shape)
        moved += require_average(exported, x[f"unet/{name}"], y[f"unet/{name}"])
    assert moved > 100, "the average differs from the training weights, or this test shows nothing"


def test_diffusers_reads_an_exported_lora_and_its_pictures_change(train: Train) -> None:
    from diffusers import StableDiffusionXLPipeline

    run, _ = train({"optimizer.d0": 1e-2})
    pipe = StableDiffusionXLPipeline.from_pretrained(BUILTIN / "tiny-sdxl", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def picture() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images = pipe("a red circle", num_inference_steps=2, generator=generator, output_type="pt", height=64, width=64)
        return images.images

    before = picture()
    pipe.load_lora_weights(run / "weights", weight_name="small.safetensors")
    loaded = [name for name, _ in pipe.unet.named_parameters() if ".lora_" in name]
    assert len(loaded) == len(
        [name for name in load_file(run / "weights" / "small.safetensors") if "lora_" in name and "alpha" not in name]
    )
    assert (picture() - before).abs().max() > 1e-4


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
