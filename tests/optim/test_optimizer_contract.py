"""Works as any torch optimizer: groups, closures, schedules, missing gradients, wrappers; and says no clearly."""

import copy
import dataclasses
import inspect
import pickle
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree, averaged, stepper, waiting
from optim.ranks import sharding
from optim.settings import Settings
from optim.steps import cpu, trial
from tests.conftest import one_in

SHAPES = [(16, 48), (48, 16), (16, 48), (40, 8, 3, 3), (7,), (33, 40)]
PATHS = [False] + ([True] if not cpu.unavailable() else [])


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.3).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int, without: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(step)
    for index, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator)
        if index not in without:
            p.grad = (0.02 * (p.detach().float() - 1) + 0.01 * noise).to(p.dtype)


def build(params: list[nn.Parameter], **settings: Any) -> ProdigyPlusScheduleFree:
    groups = [{"params": params[:3], "name": "unet"}, {"params": params[3:], "name": "text"}]
    return ProdigyPlusScheduleFree(groups, **{"d0": 1e-4, **settings})


def same(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(torch.equal(p.detach(), q.detach()) for p, q in zip(a, b, strict=True))


def snapshot(optimizer: ProdigyPlusScheduleFree) -> dict[tuple[int, str], Tensor]:
    state = optimizer.state_dict()["state"]
    return {(index, name): tensor.clone() for index, tensors in state.items() for name, tensor in tensors.items()}


# ------------------------------------------------------------------ gradients that are not there, or not finite


@pytest.mark.parametrize("compile_step", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was_and_is_counted(
    bad: float, dtype: torch.dtype, compile_step: bool
) -> None:
    params = params_of(dtype)
    optimizer = build(params, compile=compile_step, weight_decay=0.1)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
    weights, state, metrics = copy.deepcopy(params), snapshot(optimizer), optimizer.metrics()
    give_gradients(params, 5)
    grad = params[4].grad
    assert grad is not None
    grad[3] = bad
    optimizer.step()
    assert same(params, weights)
    assert all(torch.equal(value, state[key]) for key, value in snapshot(optimizer).items())
    for before, after in zip(metrics, optimizer.metrics(), strict=True):
        assert (after.skipped, after.k, after.d) == (before.skipped + 1, before.k, before.d)


@pytest.mark.parametrize("settings", [{"use_schedulefree": False}, {"use_speed": True}, {"eps": 1e-8}])
def test_that_holds_for_other_settings_too(settings: dict[str, Any]) -> None:
    params = params_of()
    optimizer = build(params, **settings)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
    weights, state = copy.deepcopy(params), snapshot(optimizer)
    give_gradients(params, 5)
    params[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
    optimizer.step()
    assert same(params, weights)
    assert all(torch.equal(value, state[key]) for key, value in snapshot(optimizer).items())


@pytest.mark.parametrize(
    "settings",
    [{}, {"eps": 1e-8}, {"factored": False}, {"use_schedulefree": False}, {"use_speed": True},
     {"weight_decay": 0.1, "weight_decay_by_lr": False}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_host_that_must_not_ask_makes_the_same_steps(
    dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, where nobody on the host may look whether the gradients are finite."""
    results = []
    for asks in (True, False):
        params = params_of(dtype)
        optimizer = build(params, compile=False, **settings)
        if not asks:
            monkeypatch.setattr(stepper, "_known_by_host", lambda all_finite: None)
        for step in range(5):
            give_gradients(params, step)
            if step == 3:
                params[1].grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
                before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
            optimizer.step()
            if step == 3:
                after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
                assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
        assert [m.skipped for m in optimizer.metrics()] == [1, 1]
        results.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("compile_step", PATHS)
def test_parameters_without_gradient_stay_and_the_others_do_not_notice(compile_step: bool) -> None:
    some, all_of_them = params_of(), params_of()
    left_out = (1, 2)
    optimizer = build(some, compile=compile_step, split_groups_mean=None)
    rest = [p for index, p in enumerate(all_of_them) if index not in left_out]
    groups = [{"params": rest[:1], "name": "unet"}, {"params": rest[1:], "name": "text"}]
    other = ProdigyPlusScheduleFree(groups, d0=1e-4, compile=compile_step, split_groups_mean=None)
    start = copy.deepcopy(some)
    for step in range(8):
        give_gradients(some, step, left_out)
        give_gradients(all_of_them, step, left_out)
        optimizer.step()
        other.step()
    assert all(torch.equal(some[index].detach(), start[index].detach()) for index in left_out)
    for index, p in enumerate(all_of_them):
        torch.testing.assert_close(some[index].detach(), p.detach(), rtol=0, atol=1e-6)
    assert [m.k for m in optimizer.metrics()] == [9, 9]


@pytest.mark.parametrize("compile_step", PATHS)
def test_a_parameter_frozen_midway_stays_and_can_come_back(compile_step: bool) -> None:
    params = params_of()
    optimizer = build(params, compile=compile_step)
    for step in range(12):
        frozen = 4 <= step < 8
        before = params[0].detach().clone()
        params[0].requires_grad_(not frozen)
        params[0].grad = None
        give_gradients(params, step, (0,) if frozen else ())
        optimizer.step()
        assert torch.equal(params[0].detach(), before) == frozen
    assert optimizer.metrics()[0].k == 13


def test_a_group_without_any_gradient_keeps_its_numbers() -> None:
    params = params_of()
    optimizer = build(params)
    for step in range(6):
        give_gradients(params, step)
        optimizer.step()
    d, r = optimizer.metrics()[1].d, float(optimizer._now.numerator[1])
    for p in params[3:]:
        p.grad = None
    optimizer.step()
    assert (optimizer.metrics()[1].d, float(optimizer._now.numerator[1])) == (d, r)


# ------------------------------------------------------------------ fused backward


def fused_pair(dtype: torch.dtype, compile_step: bool, steps: int = 8) -> list[list[nn.Parameter]]:
    results = []
    for fused in (False, True):
        params = params_of(dtype)
        optimizer = build(params, fused_back_pass=fused, compile=compile_step)
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            if step == 5:
                params[1].requires_grad_(False)
            loss = torch.zeros(())
            for index, p in enumerate(params):
                if (step, index) != (3, 2):  # one parameter has no gradient in one step
                    target = torch.randn(p.shape, generator=generator)
                    loss = loss + (p.float() - 1 - target).square().sum()
            loss.backward()
            there = [i for i, p in enumerate(params) if p.grad is not None]
            if fused:
                assert sum(params[i].nbytes for i in there) < sum(p.nbytes for p in params) // 32
            else:
                assert there == [i for i, p in enumerate(params) if (step, i) != (3, 2) and p.requires_grad]
            optimizer.step()
            optimizer.zero_grad()
        assert [m.k for m in optimizer.metrics()] == [steps + 1] * 2
        results.append(params)
    return results


@pytest.mark.parametrize("compile_step", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_not_fused_to_the_bit(dtype: torch.dtype, compile_step: bool) -> None:
    plain, fused = fused_pair(dtype, compile_step)
    assert same(plain, fused)


@pytest.mark.parametrize(("dtype", "eps"), one_in(3, product([torch.float32, torch.bfloat16], [None, 1e-8])))
def test_fused_is_not_fused_on_several_threads_either(dtype: torch.dtype, eps: float | None) -> None:
    """torch deals a large sum out to threads, in as many parts as there are."""
    torch.set_num_threads(2)  # the fixture of this folder sets it back
    shapes = [(40_001,), (40_001,), (40_001,), (150, 301), (150, 301), (33, 1001)]
    results = []
    for fused in (False, True):
        params = [nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).view(s).to(dtype)) for s in shapes]
        optimizer = ProdigyPlusScheduleFree(params, d0=1e-3, eps=eps, fused_back_pass=fused, compile=False)
        for step in range(3):
            sum((p.float() - 0.1 * step).square().sum() for p in params).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        results.append([*params, *(optimizer.state[p]["z"] for p in params)])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("size", [64, 1], ids=["stepped already", "waits"])
def test_a_second_gradient_before_step_is_refused_when_fused(size: int) -> None:
    params = [nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(64))]
    optimizer = ProdigyPlusScheduleFree(params, d0=1e-4, fused_back_pass=True)
    params[0].square().sum().backward()
    assert (params[0].grad is not None) == (size == 1)
    with pytest.raises(RuntimeError, match="second gradient before step"):
        params[0].square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    params[0].square().sum().backward()


def fused_of_many() -> tuple[list[nn.Parameter], ProdigyPlusScheduleFree]:
    params = [nn.Parameter(torch.full((4,), 1.0 + index)) for index in range(200)]
    return params, ProdigyPlusScheduleFree(params, d0=1e-3, fused_back_pass=True, compile=False)


def pull(params: list[nn.Parameter]) -> list[int]:
    """One backward; return which parameters wait for the step after it."""
    sum(p.square().sum() for p in params).backward()  # type: ignore[union-attr]
    return [index for index, p in enumerate(params) if p.grad is not None]


def test_gradients_that_waited_and_were_dropped_move_nothing() -> None:
    params, optimizer = fused_of_many()
    waited = pull(params)
    assert 0 < len(waited) < 10
    optimizer.zero_grad()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    pull(params)
    optimizer.step()
    assert not any(torch.equal(params[index], before[index]) for index in waited)


def test_a_state_that_is_loaded_within_a_fused_step_leaves_no_gradient_of_it() -> None:
    params, optimizer = fused_of_many()
    pull(params)
    optimizer.step()
    state = optimizer.state_dict()
    assert pull(params)
    optimizer.load_state_dict(state)
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("compile_step", PATHS)
def test_many_small_parameters_step_together_in_a_fused_backward(
    monkeypatch: pytest.MonkeyPatch, compile_step: bool
) -> None:
    """As often as their gradients make up a thirty-second of all, and bit for bit as if each stepped alone."""
    calls: list[int] = []
    original = stepper.Stepper.step

    def counted(self: stepper.Stepper, present: list[int], *more: Any) -> Tensor:
        calls.append(len(present))
        return original(self, present, *more)

    monkeypatch.setattr(stepper.Stepper, "step", counted)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(8 if index % 3 else (3, 40), generator=generator) for index in range(200)]
    results = []
    for share in (32, 10**9):
        monkeypatch.setattr(waiting, "SHARE", share)
        params = [nn.Parameter(value.clone()) for value in values]
        optimizer = build(params, fused_back_pass=True, compile=compile_step)
        for step in range(3):
            sum((p - 0.1 * step).square().sum() for p in params).backward()  # type: ignore[union-attr]
            optimizer.step()
        results.append([p.detach() for p in params])
        assert sum(calls) == 600
        assert len(calls) <= 3 * 32 + 3 if share == 32 else calls == [1] * 600
        calls.clear()
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("compile_step", PATHS)
def test_from_a_gradient_that_is_not_finite_on_nothing_moves_in_a_fused_backward(compile_step: bool) -> None:
    params = [nn.Parameter(torch.full((40,), 1.0 + index)) for index in range(6)]
    optimizer = build(params, fused_back_pass=True, compile=compile_step)
    loss = torch.zeros(())
    for index, p in enumerate(params):  # the last one is met first by backward
        loss = loss + p.square().sum() * (float("nan") if index == 3 else 1.0)
    before = [p.detach().clone() for p in params]
    loss.backward()
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert moved == [False, False, False, False, True, True]
    assert [metrics.skipped for metrics in optimizer.metrics()] == [1, 1]


def test_lending_within_a_fused_step_is_refused() -> None:
    params = params_of()
    optimizer = build(params, fused_back_pass=True)
    params[0].square().sum().backward()
    with pytest.raises(RuntimeError, match="between a fused backward and its step"):
        optimizer.eval()
    optimizer.step()
    with averaged(optimizer), pytest.raises(RuntimeError, match="averaged weights"):
        params[0].square().sum().backward()


# ------------------------------------------------------------------ the host, the generators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{}, {"eps": 1e-8}, {"use_speed": True}, {"split_groups": False}, {"use_schedulefree": False},
     {"prodigy_steps": "auto"}, {"weight_decay": 0.1, "fused_back_pass": True}],
    ids=str,
)  # fmt: skip
def test_a_step_asks_the_device_nothing(
    settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on torch's meta device have no values: whoever asks for one gets an error."""
    monkeypatch.setattr(sharding, "reduce_counts", lambda counts, splits: torch.ones(len(counts)))  # asked once
    params = [nn.Parameter(p.to("meta")) for p in params_of(dtype)]
    optimizer = build(params, **settings)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1.0 - 0.1 * step  # as a schedule does
        if optimizer.settings.fused_back_pass:
            sum((p.sum() for p in params), torch.zeros((), device="meta")).backward()
        else:
            for p in params:
                p.grad = torch.empty_like(p)
        optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.metrics()


def test_the_global_generators_are_never_touched() -> None:
    params = params_of(torch.bfloat16)
    optimizer = build(params)
    before = torch.get_rng_state()
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_stochastic_rounding_is_right_on_average_and_depends_on_the_seed() -> None:
    means, weights = {}, {}
    for name, settings in {"on": {}, "other seed": {"seed": 1}, "off": {"stochastic_rounding": False}}.items():
        p = nn.Parameter(torch.full((100, 100), 1.0, dtype=torch.bfloat16))
        optimizer = ProdigyPlusScheduleFree([p], d0=1e-4, prodigy_steps=1, lr=1.0, **settings)  # type: ignore[arg-type]
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        means[name] = float(optimizer.state[p]["z"].float().mean())
        weights[name] = optimizer.state[p]["z"].clone()
    moved = 1 - sum(1e-4 * 4 / torch.pi * torch.atan2(torch.tensor(1.0), torch.tensor(1 - 0.99**k).sqrt()) for k in
                    range(1, 21))  # fmt: skip
    assert means["off"] == 1.0, "steps below half a bfloat16 are lost when rounding to the nearest"
    assert means["on"] == pytest.approx(float(moved), abs=2e-4)
    assert not torch.equal(weights["on"], weights["other seed"])


# ------------------------------------------------------------------ groups and closures


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    params = params_of()
    optimizer = build(params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        return loss

    start = copy.deepcopy(params)
    assert float(optimizer.step(closure)) > 0
    assert not same(params, start)


def test_groups_have_their_own_lr_and_weight_decay() -> None:
    params = [nn.Parameter(torch.ones(4, 40)) for _ in range(3)]
    groups: list[dict[str, Any]] = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5},
                                    {"params": [params[2]], "weight_decay": 10.0}]  # fmt: skip
    optimizer = ProdigyPlusScheduleFree(groups, d0=1e-2, split_groups=False, prodigy_steps=1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [float((1 - p.detach()).mean()) for p in params]
    assert moved[1] == pytest.approx(moved[0] / 2, rel=1e-5)
    assert moved[2] > 5 * moved[0]
    assert [m.name for m in optimizer.metrics()] == ["group_0", "group_1", "group_2"]


def test_a_group_can_be_added_midway() -> None:
    params = params_of()
    optimizer = ProdigyPlusScheduleFree([{"params": params[:3], "name": "unet"}], d0=1e-4, split_groups_mean=None)
    for step in range(4):
        give_gradients(params[:3], step)
        optimizer.step()
    d = optimizer.metrics()[0].d
    optimizer.add_param_group({"params": params[3:], "name": "text", "lr": 0.5})
    assert [m.d for m in optimizer.metrics()] == [d, 1e-4]
    start = copy.deepcopy(params)
    give_gradients(params, 9)
    optimizer.step()
    assert not any(torch.equal(p.detach(), q.detach()) for p, q in zip(params, start, strict=True))


def test_a_schedule_that_writes_lr_is_followed() -> None:
    params = params_of()
    optimizer = build(params)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    for step in range(4):
        before = copy.deepcopy(params)
        give_gradients(params, step)
        optimizer.step()
        schedule.step()
        assert same(params, before) == (step >= 2)


def test_zero_grad_clears_gradients() -> None:
    params = params_of()
    optimizer = build(params)
    give_gradients(params, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_channels_last_weights_and_gradients_are_followed() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(params_of()[3].detach().to(memory_format=memory_format))
        optimizer = ProdigyPlusScheduleFree([p], d0=1e-3, compile=PATHS[-1])
        for _ in range(4):
            p.grad = (p.detach() - 1).to(memory_format=memory_format)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


# ------------------------------------------------------------------ wrappers


def test_accelerate_wraps_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(40, 8)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-3)
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped_model, wrapped = accelerator.prepare(model, optimizer)
    wrapped.train()
    for _ in range(3):
        accelerator.backward(wrapped_model(torch.ones(4, 40)).square().mean())
        wrapped.step()
        wrapped.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    wrapped.eval()
    assert optimizer.holds_average
    wrapped.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    wrapped.load_state_dict(wrapped.state_dict())


@pytest.mark.parametrize("settings", [{}, {"fused_back_pass": True}])
def test_parameters_put_into_the_groups_before_the_first_step_are_those_that_train(settings: dict[str, Any]) -> None:
    """What accelerate does under FSDP2: an optimizer that went on with the old ones would train nothing, in silence."""
    results = []
    for replace in (False, True):
        params = params_of()
        optimizer = build([nn.Parameter(p.detach().clone()) for p in params] if replace else params, **settings)
        optimizer.param_groups[1]["lr"] = 0.5
        if replace:
            optimizer.load_state_dict(optimizer.state_dict())
            for group, mine in zip(optimizer.param_groups, (params[:3], params[3:]), strict=True):
                group["params"] = mine
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            sum(
                ((p - torch.randn(p.shape, generator=generator)).square().sum() for p in params), torch.zeros(())
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((params, optimizer.metrics()))
    assert same(results[0][0], results[1][0])
    assert not same(results[0][0], params_of())
    assert results[0][1] == results[1][1]


def test_parameters_replaced_after_the_first_step_are_refused() -> None:
    params = params_of()
    optimizer = build(params)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["params"] = params_of()[:3]
    with pytest.raises(RuntimeError, match="replaced after the first step"):
        optimizer.step()


def test_a_compiled_model_trains_as_the_same_model_does() -> None:
    results = []
    for backend in (None, "eager"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 2))
        run = model if backend is None else torch.compile(model, backend=backend)
        optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-3)
        for step in range(5):
            x = torch.randn(4, 40, generator=torch.Generator().manual_seed(step))
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ refusals


def test_grad_scaler_is_refused_with_the_reason() -> None:
    params = params_of()
    optimizer = build(params)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(sum((p.sum() for p in params), torch.zeros(()))).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used"):
        scaler.step(optimizer)


def test_pickling_and_copying_are_refused_with_the_way_out() -> None:
    optimizer = build(params_of())
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="state_dict"):
            attempt(optimizer)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(50, 40, sparse=True)
    optimizer = ProdigyPlusScheduleFree(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_a_refused_gradient_leaves_no_trace() -> None:
    results = []
    for refused in (False, True):
        params = params_of(torch.bfloat16)
        optimizer = build(params)
        for step in range(3):
            if refused and step:
                give_gradients(params, 7)
                params[0].grad = params[0].grad.to_sparse()  # type: ignore[union-attr]
                with pytest.raises(ValueError, match="sparse"):
                    optimizer.step()
                with averaged(optimizer):
                    pass
            give_gradients(params, step)
            optimizer.step()
        results.append([p.detach() for p in params] + [t for p in params for t in optimizer.state[p].values()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_was_interrupted_can_be_given_up_until_a_weight_has_moved(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    def interrupted(self: stepper.Stepper, *arguments: Any) -> Tensor:
        if moves:
            original(self, *arguments)
        raise MemoryError

    original = stepper.Stepper.step
    results = []
    for moves in (None, False, True):
        params = params_of()
        optimizer = build(params, fused_back_pass=fused)
        give_gradients(params, 0)
        optimizer.step()
        assert optimizer.abandon_step(), "between two steps there is nothing to give up"
        if moves is not None:
            with monkeypatch.context() as patch:
                patch.setattr(stepper.Stepper, "step", interrupted)
                give_gradients(params, 1)
                with pytest.raises(MemoryError):
                    optimizer.step()
            assert optimizer.abandon_step() is not moves
        if not moves:
            give_gradients(params, 1)
            optimizer.step()
            results.append([p.detach() for p in params] + [t for p in params for t in optimizer.state[p].values()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr = -1.0"),
    ({"lr": float("nan")}, "lr = nan"),
    ({"lr": True}, "lr = True"),
    ({"weight_decay": -0.1}, "weight_decay = -0.1"),
    ({"d0": 0.0}, "d0 = 0.0 .* > 0"),
    ({"d_coef": -1.0}, "d_coef = -1.0"),
    ({"betas": (1.0, 0.99)}, r"betas\[0\] = 1.0.*\(0, 1\)"),
    ({"betas": (0.0, 0.99)}, r"betas\[0\] = 0.0"),
    ({"betas": (0.9, 1.0)}, r"betas\[1\] = 1.0"),
    ({"betas": 0.9}, "betas = 0.9"),
    ({"beta3": 1.0}, "beta3 = 1.0"),
    ({"beta4": 1.0}, "beta4 = 1.0"),
    ({"eps": 0.0}, "eps = 0.0"),
    ({"prodigy_steps": -1}, "prodigy_steps = -1"),
    ({"prodigy_steps": "soon"}, "prodigy_steps = 'soon'"),
    ({"schedulefree_c": -1.0}, "schedulefree_c = -1.0"),
    ({"split_groups_mean": "median"}, "split_groups_mean = 'median' .* harmonic_mean"),
    ({"seed": -1}, "seed = -1"),
    ({"use_schedulefree": False, "schedulefree_c": 8.0}, "schedulefree_c > 0 with use_schedulefree=False"),
    ({"use_speed": True, "beta4": 0.9}, "use_speed with beta4"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_a_bad_setting_is_refused_by_name_value_and_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(" .* ", ".*")):
        build(params_of(), **settings)


def test_a_keyword_that_is_no_setting_is_refused_with_the_nearest_that_is_one() -> None:
    with pytest.raises(TypeError, match="unknown setting 'use_stableadam'; did you mean 'use_stableadamw'"):
        build(params_of(), use_stableadam=True)
    with pytest.raises(TypeError, match=r"unknown setting 'momentum'$"):
        build(params_of(), momentum=0.9)


def test_the_signature_shows_every_setting_with_its_default() -> None:
    shown = list(inspect.signature(ProdigyPlusScheduleFree).parameters.values())
    assert shown[0].name == "params"
    assert {p.name: p.default for p in shown[1:]} == dataclasses.asdict(Settings())
    args = inspect.getdoc(Settings).split("Args:")[1]  # type: ignore[union-attr]
    explained = re.findall(r"^    (\w+): ", args.split("Raises:")[0], flags=re.MULTILINE)
    assert explained == [field.name for field in dataclasses.fields(Settings)]


def test_lr_may_stand_without_its_name_as_with_every_torch_optimizer() -> None:
    assert ProdigyPlusScheduleFree(params_of(), 0.5).metrics()[0].lr == 0.5


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"beta3.*seed"):
        build(params_of(), beta3=2.0, seed=-1)


def test_bad_parameters_are_refused() -> None:
    p, q = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="empty parameter list"):
        ProdigyPlusScheduleFree([])
    with pytest.raises(ValueError, match="holds no parameters"):
        ProdigyPlusScheduleFree([{"params": [], "name": "unet"}])
    with pytest.raises(ValueError, match="more than once"):
        ProdigyPlusScheduleFree([{"params": [p]}, {"params": [q, p]}])
    with pytest.raises(ValueError, match=r"float16: must be torch\.float32 or torch\.bfloat16"):
        ProdigyPlusScheduleFree([nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    with pytest.raises(ValueError, match="complex64"):
        ProdigyPlusScheduleFree([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="all must be on one device"):
        ProdigyPlusScheduleFree([p, nn.Parameter(torch.zeros(2, device="meta"))])
    with pytest.raises(ValueError, match="sets eps: a group may set only"):
        ProdigyPlusScheduleFree([{"params": [p], "eps": 1e-8}])
    with pytest.raises(ValueError, match="two groups are named 'unet'"):
        ProdigyPlusScheduleFree([{"params": [p], "name": "unet"}, {"params": [q], "name": "unet"}])
    with pytest.raises(ValueError, match=r"lr = -2\.0 in group 'unet'"):
        ProdigyPlusScheduleFree([{"params": [p], "name": "unet", "lr": -2.0}])


def forget_the_library() -> None:
    for kept in (cpu.library, cpu.unavailable, cpu._reason_against, trial.warn_once):
        kept.cache_clear()


@pytest.fixture
def no_library_yet() -> Iterator[None]:
    forget_the_library()
    yield
    forget_the_library()


def test_without_a_compiler_plain_torch_is_used_with_one_warning(
    no_library_yet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    params = params_of()
    optimizer = build(params, compile=True)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler") as said:
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
    assert len(said) == 1
    assert optimizer.metrics()[0].k == 4


WRONG_SOURCES = {
    "the part of the move that y takes": ("- share * move", "- 0.9f * share * move"),
    "the average": ("+ weight * (z[j]", "+ 0.9f * weight * (z[j]"),
    "weight decay": ("+ away * y[j]", "+ 0.9f * away * y[j]"),
    "the second moment": ("job.col[j] = job.col_now[j] * col_gain", "job.col[j] = job.col_now[j] * 0.9f * col_gain"),
    "Prodigy's numerator": ("out[0] = num * lam", "out[0] = num * lam * 0.9"),
    "Prodigy's average of gradients": ("gradients[j] * lam)", "gradients[j] * lam * 0.9f)"),
    "the random bits": ("(x & 0xFFFFu)", "(x & 0x7FFFu)"),
    "nothing is made": ("if (!*all_finite) return;", "return;"),
}


@pytest.mark.skipif(len(PATHS) == 1, reason="no working C++ compiler")
@pytest.mark.parametrize("wrong", WRONG_SOURCES)
def test_a_library_that_goes_wrong_touches_no_weight(
    wrong: str, no_library_yet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, replaced = WRONG_SOURCES[wrong]
    for source in (cpu.SOURCE, cpu.SOURCE.with_name(cpu.TILES)):
        (tmp_path / source.name).write_text(source.read_text().replace(right, replaced))
    assert replaced in "".join(path.read_text() for path in tmp_path.iterdir())
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / cpu.SOURCE.name)
    monkeypatch.setattr(cpu, "OPTIMIZED", "-O1")  # compiles in a third of the time
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain, params = params_of(torch.bfloat16), params_of(torch.bfloat16)
    both = ((plain, build(plain, compile=False)), (params, build(params, compile=True)))
    with pytest.warns(UserWarning, match="differ from plain torch's by") as said:
        for chosen, optimizer in both:
            for step in range(2):
                give_gradients(chosen, step)
                optimizer.step()
    assert len(said) == 1
    assert both[1][1]._stepper.tables == []
    assert same(plain, params)


@pytest.mark.skipif(len(PATHS) == 1, reason="no working C++ compiler")
@pytest.mark.parametrize(
    ("before", "after"), [("int64_t A; int64_t B;", "int64_t B; int64_t A;"), ("dlr, weight", "weight, dlr")]
)
def test_a_library_that_was_compiled_for_another_order_is_not_used(
    before: str, after: str, no_library_yet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order stands in Python alone, which hands it to the compiler; here it hands over another."""
    swapped = [text.replace(before, after) for text in cpu.definitions()]
    assert swapped != cpu.definitions()
    monkeypatch.setattr(cpu, "definitions", lambda: swapped)
    monkeypatch.setattr(cpu, "OPTIMIZED", "-O1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "another order" in cpu.unavailable()
    params = params_of()
    optimizer = build(params, compile=True)
    give_gradients(params, 0)
    with pytest.warns(UserWarning, match="plain torch is: .* another order"):
        optimizer.step()
