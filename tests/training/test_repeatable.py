"""`deterministic`: on a card, only kernels that repeat their bits. PyTorch refuses what has none, here as there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.config.read import resolve
from sdtrain.training.run import repeatable
from tests.test_laws import METHODS

Train = Callable[..., tuple[Path, str]]
CUDA = torch.device("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("wanted", "device", "is_on"), [(True, "cuda", True), (True, "cpu", False), (False, "cuda", False)]
)
def test_kernels_repeat_where_it_is_asked_for_on_a_card_and_as_long_as_it_runs(
    table: dict[str, Any], wanted: bool, device: str, is_on: bool
) -> None:
    config = resolve(table | {"deterministic": wanted}, "test config")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(KeyError), repeatable(config, torch.device(device)):
        assert torch.are_deterministic_algorithms_enabled() == is_on
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == is_on
        assert torch.utils.deterministic.fill_uninitialized_memory == (filled and not is_on)
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora in bfloat16"])
def test_all_that_trains_has_kernels_that_repeat(
    train: Train, table: dict[str, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the CPU's know: the run is let into the block as if it were on a card."""
    entered: list[bool] = []

    def as_on_a_card(config: Any, _: torch.device) -> Any:
        entered.append(config.deterministic)
        return repeatable(config, CUDA)

    monkeypatch.setattr("sdtrain.training.run.repeatable", as_on_a_card)
    seen: list[bool] = []
    train(
        {**METHODS[method], "deterministic": True, "preview.every": 2, "steps": 2},
        watchers=[lambda record: seen.append(torch.are_deterministic_algorithms_enabled())],
    )
    assert entered == [True] and seen and all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_verify_resume_asks_for_it(table: dict[str, Any], tmp_path: Path) -> None:
    from sdtrain.commands.verify_resume import shortened

    config = resolve(table, "test config")
    assert not config.deterministic and shortened(config, 2, tmp_path).deterministic
