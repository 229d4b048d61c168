"""The plan of a U-Net of 114 million parameters is what is counted in a real run of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtrain.config.schema import Config
from tests.training.planning.test_plan import config_of, counted, peaks, traced

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))  # its files import one another, as they do when run

import bench_fit

__all__ = ["config_of"]


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The larger model of `scripts/bench_fit.py`: the built-in one around a U-Net of random numbers."""
    return bench_fit.prepare(tmp_path_factory.mktemp("larger") / "mid", "mid") / "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"data.batch_size": 3, "method.rank": 16, "preview.every": 1},
        {"memory.gradient_checkpointing": True},
        {"memory.recompute": ["mid_block.attentions.0", "up_blocks.0"]},
        {"method.adapter": "dora", "method.targets": "attention+ff"},
        {"method.kind": "full"},
        {"method.kind": "full", "memory.fused_back_pass": True},
    ],
    ids=["lora", "recomputed", "parts", "dora", "full", "fused"],
)
def test_a_plan_is_within_three_percent_of_the_truth(
    config_of: Callable[..., Config],
    larger: Path,
    changes: dict[str, Any],
) -> None:
    config = config_of({"model.path": str(larger), "data.resolution_px": 128, "data.bucket_step_px": 128, **changes})
    planned, true = peaks(traced(config)), counted(config)
    for phase, num_bytes in true.items():
        assert planned[phase] == pytest.approx(num_bytes, rel=0.03), (phase, planned, true)
