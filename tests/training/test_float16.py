"""A run in float16: its loss is scaled, its update is not, an overflow costs a step and halves the scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdtrain.config.read import resolve
from sdtrain.config.schema import Config
from sdtrain.errors import NotFiniteError, UserError
from sdtrain.training.computing.objective import Objective
from sdtrain.training.ending import scaling
from sdtrain.training.ending.guard import backward
from sdtrain.training.ending.scaling import FIRST, HIGHEST, LossScale
from sdtrain.training.run import autocast_dtype, chose_float16, computes_in_float16, pick_dtype
from sdtrain.training.watching.records import StepRecord
from tests.conftest import merged

Train = Callable[..., tuple[Path, str]]
CARD, CPU = torch.device("cuda"), torch.device("cpu")
SMALL = {"data.resolution_px": 64, "data.batch_size": 1, "model.dtype": "float16"}
FULL = SMALL | {"method": {"kind": "full"}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": SMALL,
    "two micro-batches": SMALL | {"data.gradient_accumulation": 2},
    "full": FULL,
    "fused": FULL | {"memory.fused_back_pass": True},
}


def bits(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "groups" in line]


def scale_of(run: Path, step: int) -> list[float]:
    found: list[float] = json.loads((run / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())["loss_scale"]
    return found


def size_of_gradients(found: list[float]) -> Callable[[object], None]:
    """A watcher that notes how large the first network's gradients were, step by step."""

    def see(record: object) -> None:
        if isinstance(record, StepRecord):
            found.append(record.groups[0].gradient)

    return see


def config_of(table: dict[str, Any], changes: dict[str, Any]) -> Config:
    return resolve(merged(table, changes), "test")


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_changes_no_bit_where_nothing_overflows_or_vanishes(
    train: Train, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """In float32, which holds the scaled gradients as exactly as the others."""
    plain = METHODS[method] | {"steps": 3, "model.dtype": "float32"}
    without, _ = train(plain | {"name": "without"})
    monkeypatch.setattr("sdtrain.training.fit.computes_in_float16", lambda config, device: True)
    scaled, _ = train(plain | {"name": "scaled"})
    assert scale_of(scaled, 3) == [FIRST, 3]
    assert bits(scaled, 3) == bits(without, 3) and losses(scaled) == losses(without)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_optimizer_sees_is_the_gradient_itself(train: Train, method: str) -> None:
    """d and its sums follow from the size of gradients: under another scale they would be those of another run."""
    sizes: dict[str, list[float]] = {}
    for dtype in ("float16", "float32"):
        found = sizes.setdefault(dtype, [])
        changes = {"name": dtype, "steps": 2, "model.dtype": dtype}
        run, _ = train(METHODS[method] | changes, watchers=[size_of_gradients(found)])
    assert len(sizes["float32"]) == 2 and min(sizes["float32"]) > 0
    assert sizes["float16"] == pytest.approx(sizes["float32"], rel=0.05)
    assert losses(run.parent / "float16") == pytest.approx(losses(run), rel=0.02)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_an_overflow_leaves_the_step_out_halves_the_scale_and_resumes_bit_for_bit(
    train: Train, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(scaling, "FIRST", 2.0**30)
    straight, said = train(METHODS[method] | {"name": "straight", "steps": 20})
    skipped = [line["step"] for line in lines(straight) if line.get("skipped")]
    assert skipped[:7] == list(range(1, 8)), "more than the guard lets pass in a row"
    assert len(skipped) < 20
    assert said.count("a gradient is too large for float16") == len(skipped)
    assert f"the scale of the loss is {2.0**29:g} now" in said
    assert scale_of(straight, 20) == [2.0**30 / 2 ** len(skipped), 20 - skipped[-1]]
    train(METHODS[method] | {"name": "again", "steps": 12})
    again, _ = train(METHODS[method] | {"name": "again", "steps": 20}, resume=True)
    assert scale_of(again, 20) == scale_of(straight, 20) and bits(straight, 20) == bits(again, 20)
    assert losses(straight) == losses(again)


def test_a_loss_that_is_not_finite_ends_the_run_all_the_same(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Objective.__call__
    monkeypatch.setattr(Objective, "__call__", lambda *arguments: plain(*arguments) * torch.inf)
    with pytest.raises(NotFiniteError, match="not finite 5 times in a row"):
        train(SMALL | {"steps": 9})


def test_a_scale_halves_at_an_overflow_and_doubles_after_many_good_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PATIENCE", 3)
    scale = LossScale(is_used=True)
    assert [scale.note(left_out=left_out) for left_out in (False, False, True, False, False)] == [0, 0, 1, 0, 0]
    assert scale.state == (FIRST / 2, 2)
    other = LossScale(is_used=True)
    other.go_on_from(scale.state)
    for each in (scale, other):
        each.note(left_out=False)
        assert each.state == (FIRST, 0)
        each.go_on_from((1.0, 0))
        assert not each.note(left_out=True) and each.value == 1
        each.go_on_from((HIGHEST, 2))
        each.note(left_out=False)
        assert each.value == HIGHEST


def test_without_float16_nothing_is_scaled(train: Train) -> None:
    scale = LossScale(is_used=False)
    assert not scale.note(left_out=True) and scale.value == 1 and scale.state is None
    run, _ = train({"steps": 1, "data.resolution_px": 64})
    assert "loss_scale" not in json.loads((run / "checkpoints" / "step-000001" / "state.json").read_text())


@pytest.mark.parametrize("within", [False, True])
def test_gradients_are_divided_exactly(within: bool) -> None:
    weights = [nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    unused = nn.Parameter(torch.ones(2))

    def loss() -> Tensor:
        return (weights[0] * weights[1].sin()).sum() ** 2

    for _ in range(2):
        backward(loss())
    wanted = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    scale = LossScale(is_used=True)
    if within:
        scale.unscale_within([*weights, unused])
    for _ in range(2):
        backward(loss(), scale.value)
    if not within:
        scale.unscale([*weights, unused])
    for weight, gradient in zip(weights, wanted, strict=True):
        assert weight.grad is not None and gradient is not None and torch.equal(weight.grad, gradient)


def test_a_run_may_go_on_in_another_precision(train: Train) -> None:
    train(SMALL | {"model.dtype": "float32", "steps": 1})
    run, _ = train(SMALL | {"steps": 2}, resume=True)
    assert scale_of(run, 2) == [FIRST, 1]


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card such as an RTX 2080: PyTorch computes in bfloat16 there, in software."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


def test_a_card_without_bfloat16_computes_in_float16(table: dict[str, Any], old_card: None) -> None:
    lora, full = config_of(table, {}), config_of(table, {"method": {"kind": "full"}})
    assert pick_dtype(lora, CARD) == torch.float16 and autocast_dtype(lora, CARD) is None
    assert pick_dtype(full, CARD) == torch.float32 and autocast_dtype(full, CARD) == torch.float16
    for config in (lora, full):
        assert computes_in_float16(config, CARD) and chose_float16(config, CARD)
        assert not computes_in_float16(config, CPU) and pick_dtype(config, CPU) == torch.float32
    for word in ("bfloat16", "mixed"):
        config = config_of(table, {"model.dtype": word, "method": {"kind": "full"}})
        with pytest.raises(UserError, match=f'{word}, but this card does not compute in bfloat16; use "float16"'):
            pick_dtype(config, CARD)
        assert not computes_in_float16(config, CARD)


def test_a_card_with_bfloat16_computes_in_it(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    config = config_of(table, {})
    assert pick_dtype(config, CARD) == torch.bfloat16 and not computes_in_float16(config, CARD)


def test_that_auto_means_float16_is_said(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtrain.training import run

    monkeypatch.setattr(run, "lacks_bfloat16", lambda device: True)
    folder, said = train(SMALL | {"model.dtype": "auto", "steps": 1})
    assert "this card does not compute in bfloat16, so the run computes in float16, with a scaled loss" in said
    assert scale_of(folder, 1) == [FIRST, 1]
