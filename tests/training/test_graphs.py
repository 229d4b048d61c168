"""Gradients that come from CUDA graphs are those of single launches. `recorded.py` stands for the card's graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.errors import UserError
from sdtrain.training import fit
from sdtrain.training.computing import graphs
from sdtrain.training.computing.objective import Objective
from tests.card.recorded import Recorded
from tests.test_laws import state_bits, weights_bits

Train = Callable[..., tuple[Path, str]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A machine on which runs use graphs."""
    found = Recorded()
    monkeypatch.setattr(graphs, "captured", found.captured)
    monkeypatch.setattr(fit, "uses_graphs", lambda run: run.config.name != "plain")
    return found


RUNS: dict[str, dict[str, Any]] = {
    "lora": {"data.gradient_accumulation": 2},
    "sizes that differ": {"data.batch_size": 3, "data.gradient_accumulation": 2},
    "dora in bfloat16": {"method.adapter": "dora", "model.dtype": "bfloat16"},
    "loha, preserved": {"method.adapter": "loha", "preserve.weight": 0.5},
    "full": {"method": {"kind": "full", "train": ["unet"]}},
    "recomputed": {"memory.gradient_checkpointing": True},
    "looked at": {"preview.every": 2, "validation.every": 1, "validation.share": 0.2, "checkpoint.every": 1},
    "float16": {"model.dtype": "float16"},
    "nf4": {"model.dtype": "bfloat16", "model.base_precision": "nf4"},
    "int8, recomputed": {"model.base_precision": "int8", "memory.gradient_checkpointing": True},
    "huber, snr": {"loss.kind": "huber", "loss.huber_schedule": "snr", "loss.weighting": "min_snr"},
}


QUICK = ("lora", "sizes that differ", "looked at")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_graphs_make_the_training_that_single_launches_make(train: Train, recorded: Recorded, name: str) -> None:
    plain, _ = train({**RUNS[name], "name": "plain", "steps": 5})
    assert not recorded.num_made
    with_graphs, _ = train({**RUNS[name], "name": "graphs", "steps": 5})
    assert recorded.num_replayed >= 3
    assert state_bits(plain, 5) == state_bits(with_graphs, 5)
    if name != "dora in bfloat16":  # which leaves two files
        assert weights_bits(plain) == weights_bits(with_graphs)


@pytest.mark.slow
def test_a_run_that_goes_on_makes_the_steps_it_would_have_made(train: Train, recorded: Recorded) -> None:
    straight, _ = train({"name": "straight", "steps": 5})
    train({"name": "resumed", "steps": 2})
    resumed, _ = train({"name": "resumed", "steps": 5}, resume=True)
    assert state_bits(straight, 5) == state_bits(resumed, 5)
    assert recorded.num_replayed


def test_pictures_of_as_many_sizes_as_steps_are_not_captured(
    train: Train, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "FEW", 1)
    plain, _ = train({"name": "plain", "steps": 6})
    many, said = train({"name": "many", "steps": 6})
    assert said.count("as many sizes of pictures as steps") == 1
    assert recorded.num_made == 1
    assert state_bits(plain, 6) == state_bits(many, 6)


@pytest.mark.parametrize(
    ("first", "error", "told"),
    [
        (1, "CUDA out of memory. Tried to allocate 2.00 GiB", "too little memory for CUDA graphs"),
        (2, "CUDA error: operation not permitted when stream is capturing", "this card refuses CUDA graphs"),
    ],
)
def test_graphs_that_cannot_be_made_are_given_up_and_the_run_goes_on(
    train: Train, recorded: Recorded, first: int, error: str, told: str
) -> None:
    recorded.fails_from, recorded.error = first, error
    changes = {"data.batch_size": 3, "data.gradient_accumulation": 2, "steps": 4}
    plain, _ = train({**changes, "name": "plain"})
    less, said = train({**changes, "name": "less"})
    assert said.count(told) == 1 and said.count("CUDA graphs") == 1
    assert recorded.num_made == first + 1, "it is tried once more when all others are gone"
    assert state_bits(plain, 4) == state_bits(less, 4)


def test_graphs_make_room_for_each_other(train: Train, recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where little is left on the card, the graph goes that was not used for the longest time."""
    changes = {"data.batch_size": 3, "data.gradient_accumulation": 2, "steps": 4}
    plain, _ = train({**changes, "name": "plain"})
    train({**changes, "name": "all"})
    made, recorded.num_made = recorded.num_made, 0
    monkeypatch.setattr(graphs, "free_bytes", lambda device: 0)
    one, _ = train({**changes, "name": "one"})
    assert recorded.num_made > made
    assert state_bits(plain, 4) == state_bits(one, 4)


@pytest.mark.slow
def test_a_step_that_runs_out_of_memory_lets_the_graphs_go(
    train: Train, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recomputed from there on is no part of those that were made before."""
    inputs, calls = Objective.inputs, 0

    def full(self: Objective, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return inputs(self, *given)

    plain, _ = train({"name": "plain", "steps": 5})
    train({"name": "enough", "steps": 5})
    made, recorded.num_made = recorded.num_made, 0
    monkeypatch.setattr(Objective, "inputs", full)
    adapted, said = train({"name": "adapted", "steps": 5, "memory.on_oom": "adapt"})
    assert "out of memory" in said
    assert recorded.num_made > made
    assert state_bits(plain, 5)["parameters.safetensors"] == state_bits(adapted, 5)["parameters.safetensors"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method.train": ["unet", "text_encoder"]}, "names text encoders"),
        ({"method.dropout": 0.1}, "method.dropout leaves out something else"),
        ({"memory.compile": True}, "memory.compile compiles"),
        ({}, "computes on no NVIDIA card"),
    ],
)
def test_graphs_that_cannot_be_are_refused(train: Train, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        train({"memory.cuda_graphs": "on", **changes})
