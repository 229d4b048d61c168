"""Laws of `sdtrain sample`: it draws what the preview drew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

Train = Callable[..., tuple[Path, str]]
PROMPTS, SEEDS = ["a red circle", "a cat"], [3, 4]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[list[Image.Image]]]:
    """The pictures of every preview of a run, in their order."""
    from sdtrain.training import outputs

    found: list[list[list[Image.Image]]] = []
    original = outputs.in_rows

    def watched(*arguments: Any) -> list[list[Image.Image]]:
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(outputs, "in_rows", watched)
    return found


def bits(rows: list[list[Image.Image]]) -> list[list[bytes]]:
    return [[picture.tobytes() for picture in row] for row in rows]


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        ("lora", {"model.dtype": "bfloat16"}),
        ("lora", {"model.dtype": "float32", "method.train": ["unet", "text_encoder"], "method.targets": "all"}),
        pytest.param("dora", {"model.dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("loha", {"model.dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("lokr", {"model.dtype": "bfloat16", "method.targets": "all"}, marks=pytest.mark.slow),
        pytest.param("oft", {"model.dtype": "float32", "method.rank": 8}, marks=pytest.mark.slow),
    ],
)
def test_a_sample_is_the_preview_of_the_same_step_prompt_and_seed(
    train: Train, drawn: list[list[list[Image.Image]]], adapter: str, settings: dict[str, Any]
) -> None:
    """Also where the base is stored in 16 bits: adapters that are added into it lose a part of what they change."""
    from sdtrain.commands.sample import draw

    previews = {"preview.every": 2, "preview.prompts": PROMPTS, "preview.seeds": SEEDS}
    learns = {"optimizer.d0": 1e-2, "checkpoint.every": 2, "checkpoint.keep": 4}
    run, _ = train({"method.adapter": adapter, **previews, **learns, **settings})
    first, second, last = map(bits, drawn)
    assert first != second != last, "or there is nothing to see"
    assert bits(draw(run, PROMPTS, SEEDS, None, []).rows) == last, "from the file"
    assert bits(draw(run, PROMPTS, SEEDS, 2, []).rows) == second, "from a training state"


@pytest.mark.parametrize(("dtype", "computed"), [("mixed", torch.bfloat16), ("float32", torch.float32)])
def test_a_preview_computes_as_the_training_does_and_so_does_a_sample(
    train: Train,
    drawn: list[list[list[Image.Image]]],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    computed: torch.dtype,
) -> None:
    """With `mixed` weights are held in float32 and computed with in bfloat16; the VAE, which would overflow, is not."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from sdtrain.commands.sample import draw

    predicted: set[torch.dtype] = set()
    decoded: set[torch.dtype] = set()
    forward, decode = UNet2DConditionModel.forward, AutoencoderKL.decode

    def watched(self: Any, *given: Any, **more: Any) -> Any:
        out = forward(self, *given, **more)
        predicted.add(out[0].dtype)
        return out

    def seen(self: Any, *given: Any, **more: Any) -> Any:
        out = decode(self, *given, **more)
        decoded.add(out.sample.dtype)
        return out

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    monkeypatch.setattr(AutoencoderKL, "decode", seen)
    looks = {"preview.every": 2, "preview.prompts": PROMPTS, "preview.seeds": SEEDS, "checkpoint.every": 2}
    method = {"kind": "full", "train": ["unet", "text_encoder"]}
    run, _ = train({"method": method, "model.dtype": dtype, "steps": 2, "optimizer.d0": 1e-3, **looks})
    base, last = map(bits, drawn)
    assert base != last, "or there is nothing to see"
    assert bits(draw(run, PROMPTS, SEEDS, 2, []).rows) == last
    assert predicted == {computed} and decoded == {torch.float32}
