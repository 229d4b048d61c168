"""Too little memory: saved and explained, or gone on with fewer pictures at once and the same draws."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load

from sdtrain.config.overrides import read_override
from sdtrain.data.batches import Batch
from sdtrain.errors import OutOfMemoryError, Problem
from sdtrain.training.computing.objective import Objective
from sdtrain.training.ending.memory import is_out_of_memory
from tests.faults.conftest import Ran, Run

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "3870720 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def losses(ran: Ran) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (ran.folder / "log.jsonl").read_text().splitlines() if '"groups"' in line
    ]


def short_of_memory(monkeypatch: pytest.MonkeyPatch, error: Exception, *, fits: int, checkpointed: bool) -> list[Any]:
    """Memory for `fits` pictures at once; checkpointed: only while activations are computed again.

    Returns the pictures, noise levels and latents that the network saw, one entry per picture and step, as it fills.
    """
    seen: list[Any] = []
    call, predict = Objective.__call__, "predict"

    def short(self: Objective, batch: Batch, generator: Callable[[int], torch.Generator]) -> torch.Tensor:
        model: Any = self.model
        if len(batch.examples) > fits or (checkpointed and not model.unet.is_gradient_checkpointing):
            raise error
        original = getattr(model, predict)

        def looked(noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Any) -> torch.Tensor:
            for index, example in enumerate(batch.examples):
                seen.append((example.path.name, int(timesteps[index]), noisy[index].numpy().tobytes()))
            result: torch.Tensor = original(noisy, timesteps, conditioning)
            return result

        model.predict = looked
        try:
            return call(self, batch, generator)
        finally:
            model.predict = original

    monkeypatch.setattr(Objective, "__call__", short)
    return seen


@pytest.mark.parametrize("error", [CPU, CUDA, MemoryError()], ids=["cpu", "cuda", "python"])
def test_too_little_memory_is_explained_with_numbers_and_what_helps(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    short_of_memory(monkeypatch, error, fits=0, checkpointed=False)
    ran = run()
    assert isinstance(ran.error, OutOfMemoryError) and ran.error.exit_code == 1 and ran.error.__cause__ is error
    text = str(ran.error)
    assert text.startswith("step 1: 1 problem\n  memory  too little for this step (")
    assert re.search(r"\d+\.\d\d GiB were in use at most", text)
    for advice in ("memory.gradient_checkpointing = true", "data.batch_size = 1 with data.gradient_accumulation = 2"):
        assert advice in text
    for setting in re.findall(r"(\w+\.\w+) = (\S+)", text):
        assert not isinstance(read_override("=".join(setting)), Problem), "what is advised can be given to --set"


def test_with_adapt_a_step_is_done_again_with_the_same_pictures_noise_and_timesteps(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        whole = short_of_memory(patch, CPU, fits=4, checkpointed=False)
        plain = run({"name": "plain", "data.batch_size": 4})
    with monkeypatch.context() as patch:
        parts = short_of_memory(patch, CPU, fits=1, checkpointed=True)
        ran = run({"name": "adapted", "data.batch_size": 4, "memory.on_oom": "adapt"})
    assert ran.result is not None and ran.result.finished
    assert parts == whole
    assert losses(ran) == pytest.approx(losses(plain), rel=1e-4)
    told = [line for line in ran.text.splitlines() if "out of memory" in line]
    assert [re.sub(r" \(.* process\)", "", line) for line in told] == [
        "step 1: out of memory; from here on activations are computed again in backward, which takes about a third "
        "more time. The step is done again.",
        "step 1: out of memory; from here on at most 2 pictures are computed at once; a step has as many as before, "
        "with the same noise. The step is done again.",
        "step 1: out of memory; from here on one picture is computed at once; a step has as many as before, with the "
        "same noise. The step is done again.",
    ]


def test_what_a_step_had_added_up_before_memory_ran_out_is_not_counted_twice(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {"data.gradient_accumulation": 2, "memory.on_oom": "adapt", "steps": 3}
    plain = run(two | {"name": "plain"})
    original = Objective.__call__

    def short(self: Objective, batch: Batch, generator: Callable[[int], torch.Generator]) -> torch.Tensor:
        model: Any = self.model
        if batch.index == 1 and not model.unet.is_gradient_checkpointing:
            raise CUDA
        return original(self, batch, generator)

    monkeypatch.setattr(Objective, "__call__", short)
    ran = run(two | {"name": "short"})
    assert ran.text.count("The step is done again.") == 1
    found, expected = (load(r.state(3)["parameters.safetensors"]) for r in (ran, plain))
    start = load(run(two | {"name": "start", "steps": 1}).state(1)["parameters.safetensors"])
    moved = sum((expected[name] - start[name]).square().sum() for name in found).sqrt()
    assert sum((found[name] - expected[name]).square().sum() for name in found).sqrt() < 1e-2 * moved


def test_where_nothing_is_left_to_give_up_the_run_ends_and_is_saved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        short_of_memory(patch, CUDA, fits=0, checkpointed=False)
        ran = run({"memory.on_oom": "adapt"})
    assert isinstance(ran.error, OutOfMemoryError)
    assert ran.text.count("The step is done again.") == 2
    assert ran.states() == ["step-000000"]
    assert run({"memory.on_oom": "adapt"}, resume=True).error is None


@pytest.mark.parametrize("error", [CPU, MemoryError()], ids=["cpu", "python"])
def test_too_little_memory_for_the_model_is_a_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def short(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("sdtrain.training.fit.load", short)
    ran = run()
    assert isinstance(ran.error, OutOfMemoryError)
    assert "memory  too little for loading the model (" in str(ran.error)


def test_an_error_of_another_kind_is_not_taken_for_too_little_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, RuntimeError("shapes do not match"), fits=0, checkpointed=False)
    ran = run({"memory.on_oom": "adapt"})
    assert isinstance(ran.error, RuntimeError) and "shapes do not match" in str(ran.error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *(
            (error, True)
            for error in (CPU, CUDA, MemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
        ),
        *((error, False) for error in (RuntimeError("shapes"), OSError(12, "Cannot allocate memory"), SystemExit())),
    ],
)
def test_what_counts_as_too_little_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
