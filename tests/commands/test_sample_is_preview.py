"""Laws of `sdtrain sample`: it draws what the preview drew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Train = Callable[..., tuple[Path, str]]
PROMPTS, SEEDS = ["a red circle", "a cat"], [3, 4]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[list[Image.Image]]]:
    """The pictures of every preview of a run, in their order."""
    from sdtrain.training import outputs

    found: list[list[list[Image.Image]]] = []
    original = outputs.render

    def watched(*arguments: Any) -> list[list[Image.Image]]:
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(outputs, "render", watched)
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
