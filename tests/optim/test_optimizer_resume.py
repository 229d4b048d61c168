"""Resume: state_dict -> safetensors -> load_state_dict continues bit for bit, and foreign state is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree, averaged, flatten_state, unflatten_state
from optim.formulas.freezing import FROZEN_FOR_ITS_WEIGHT

SHAPES = [(16, 48), (40, 8), (16, 48), (40, 4, 3, 3), (7,), (), (3, 5)]


def model(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    params[1].data.zero_()
    return params


def build(params: list[nn.Parameter], **settings: Any) -> ProdigyPlusScheduleFree:
    groups = [{"params": params[:3], "name": "unet"}, {"params": params[3:], "name": "text_encoder", "lr": 0.5}]
    return ProdigyPlusScheduleFree(groups, **{"d0": 1e-4, **settings})


def steps(params: list[nn.Parameter], optimizer: ProdigyPlusScheduleFree, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            noise = torch.randn(p.shape, generator=generator)
            p.grad = (p.detach().float() + 0.3 * noise).to(p.dtype)
        optimizer.step()


def through_a_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    tensors, metadata = flatten_state(state)
    save_file(tensors, path, metadata=metadata)
    with safe_open(path, framework="pt") as file:
        return unflatten_state({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118


def everything(params: list[nn.Parameter], optimizer: ProdigyPlusScheduleFree) -> dict[str, Tensor]:
    tensors, _ = flatten_state(optimizer.state_dict())
    return tensors | {f"y.{index}": p.detach().clone() for index, p in enumerate(params)}


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "joint": {"split_groups": False},
    "eps": {"eps": 1e-8},
    "not factored": {"factored": False},
    "factors in bf16": {"factored_fp32": False},
    "speed": {"use_speed": True},
    "first moment": {"use_schedulefree": False},
    "frozen": {"prodigy_steps": 8},
    "auto": {"prodigy_steps": "auto"},
    "bias correction": {"use_bias_correction": True},
    "beta4": {"beta4": 0.9},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_resumed_is_uninterrupted_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    params = model(dtype)
    optimizer = build(params, **settings)
    steps(params, optimizer, 0, 12)
    weights = [p.detach().clone() for p in params]
    state = through_a_file(optimizer.state_dict(), tmp_path / "state.safetensors")
    steps(params, optimizer, 12, 24)

    again = [nn.Parameter(w) for w in weights]
    resumed = build(again, **settings)
    resumed.load_state_dict(state)
    steps(again, resumed, 12, 24)

    expected, found = everything(params, optimizer), everything(again, resumed)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    assert optimizer.metrics() == resumed.metrics()


@pytest.mark.parametrize("compile_step", [False, True])
def test_a_state_replaces_whatever_the_optimizer_had(compile_step: bool) -> None:
    params = model(torch.float32)
    optimizer = build(params, compile=compile_step)
    steps(params, optimizer, 0, 5)
    weights, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    steps(params, optimizer, 5, 9)
    expected = everything(params, optimizer)
    for p, w in zip(params, weights, strict=True):
        p.data.copy_(w)
    optimizer.load_state_dict(state)
    assert len(optimizer._kept.stacks) == len({id(stack) for stack, _ in optimizer._kept.slots.values()})
    steps(params, optimizer, 5, 9)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in everything(params, optimizer).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_taken_while_x_is_lent_gives_back_y(dtype: torch.dtype, tmp_path: Path) -> None:
    params = model(dtype)
    optimizer = build(params)
    steps(params, optimizer, 0, 12)
    with averaged(optimizer):
        x = [p.detach().clone() for p in params]
        state = through_a_file(optimizer.state_dict(), tmp_path / "state.safetensors")

    again = [nn.Parameter(w) for w in x]
    resumed = build(again)
    resumed.load_state_dict(state)
    assert resumed.holds_average
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    steps(params, optimizer, 12, 20)
    steps(again, resumed, 12, 20)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_state_of_before_the_first_step_can_be_loaded() -> None:
    params = model(torch.float32)
    optimizer = build(params)
    optimizer.load_state_dict(optimizer.state_dict())
    steps(params, optimizer, 0, 2)


def test_lr_of_a_schedule_is_part_of_the_state() -> None:
    params = model(torch.float32)
    optimizer = build(params)
    optimizer.param_groups[0]["lr"] = 0.25
    steps(params, optimizer, 0, 1)
    again = model(torch.float32)
    resumed = build(again)
    resumed.load_state_dict(optimizer.state_dict())
    assert [m.lr for m in resumed.metrics()] == [0.25, 0.5]


def test_a_state_that_an_older_version_wrote_continues_as_it_did_there() -> None:
    """states/version_1.safetensors holds a state after 12 steps, the y of that time, and the y of 12 steps later."""
    with safe_open(Path(__file__).parent / "states" / "version_1.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    params = [nn.Parameter(tensors.pop(f"y.{index}")) for index in range(7)]
    later = [tensors.pop(f"later.{index}") for index in range(7)]
    optimizer = build(params)
    optimizer.load_state_dict(unflatten_state(tensors, metadata))
    written = flatten_state(optimizer.state_dict())[0]
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items() if name != "numbers")
    assert torch.equal(written["numbers"][:4], tensors["numbers"][:4])
    steps(params, optimizer, 12, 24)
    for p, expected in zip(params[:3], later[:3], strict=True):  # the others' weight is held back now while d climbs
        # another processor adds up in another order
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)
    assert [m.d for m in optimizer.metrics()] == pytest.approx([0.0032, 0.0064], rel=2e-1)


def saved() -> dict[str, Any]:
    params = model(torch.float32)
    optimizer = build(params)
    steps(params, optimizer, 0, 3)
    return optimizer.state_dict()


def refused(state: dict[str, Any], match: str, **settings: Any) -> None:
    params = model(torch.float32)
    optimizer = build(params, **settings)
    steps(params, optimizer, 0, 2)
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    after = everything(params, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before), "a refused state must leave all as it was"


def test_another_version_is_refused_showing_both() -> None:
    refused({**saved(), "version": 7}, "version 7 .* version 1")


def test_other_settings_are_refused_showing_both() -> None:
    refused(saved(), "factored was True, is False", factored=False)


def test_a_state_with_a_setting_that_is_no_more_is_refused_unless_it_was_off() -> None:
    state = saved()
    state["settings"]["use_focus"] = True
    refused(state, "use_focus was True, which this version does not have")


def test_other_groups_are_refused_showing_both() -> None:
    state = saved()
    state["param_groups"] = state["param_groups"][:1]
    refused(state, "1 groups, the optimizer 2")


def test_other_names_are_refused_showing_both() -> None:
    state = saved()
    state["param_groups"][1]["name"] = "vae"
    refused(state, "'vae', is 'text_encoder'")


def test_another_number_of_parameters_is_refused_showing_both() -> None:
    state = saved()
    state["param_groups"][1]["params"] = [3, 4]
    refused(state, "had 2 parameters, has 4")


def test_another_shape_is_refused_showing_both() -> None:
    state = saved()
    state["state"][0]["z"] = torch.zeros(16, 47)
    refused(state, r"\(16, 47\), has \(16, 48\)")


def test_another_dtype_is_refused_showing_both() -> None:
    state = saved()
    state["state"][0]["row"] = state["state"][0]["row"].bfloat16()
    refused(state, "bfloat16, must be .* torch.float32")


def test_the_state_of_another_optimizer_is_refused() -> None:
    params = model(torch.float32)
    other = torch.optim.AdamW(params)
    refused(other.state_dict(), "another optimizer's")


def test_text_without_our_key_is_refused() -> None:
    with pytest.raises(ValueError, match="metadata has"):
        unflatten_state({}, {"format": "pt"})


def resumed_with(state: dict[str, Any], **settings: Any) -> tuple[list[nn.Parameter], ProdigyPlusScheduleFree]:
    params = model(torch.float32)
    optimizer = build(params, **settings)
    optimizer.load_state_dict(state)
    return params, optimizer


def test_a_d_that_was_fixed_while_it_climbed_climbs_on_when_the_settings_are_changed() -> None:
    params = model(torch.float32)
    optimizer = build(params, prodigy_steps=8)
    steps(params, optimizer, 0, 12)
    before = [m.d for m in optimizer.metrics()]
    assert all(m.climbing and m.frozen for m in optimizer.metrics())
    for settings in ({"prodigy_steps": "auto"}, {"prodigy_steps": 0}, {"prodigy_steps": 60}):
        again, resumed = resumed_with(optimizer.state_dict(), **settings)
        assert resumed.thaw() == ["unet", "text_encoder"]
        assert [m.d for m in resumed.metrics()] == before and not any(m.frozen for m in resumed.metrics())
        steps(again, resumed, 12, 40)
        assert all(m.d > 1.5 * d for m, d in zip(resumed.metrics(), before, strict=True))
        # and its state continues bit for bit
        copied, last = resumed_with(resumed.state_dict(), **settings)
        for p, q in zip(copied, again, strict=True):
            p.data.copy_(q.detach())
        assert last.thaw() == []
        steps(again, resumed, 40, 45)
        steps(copied, last, 40, 45)
        assert all(torch.equal(p, q) for p, q in zip(copied, again, strict=True))


def test_nothing_is_thawed_where_nothing_was_changed_or_d_was_at_rest() -> None:
    params = model(torch.float32)
    optimizer = build(params, prodigy_steps=8)
    steps(params, optimizer, 0, 12)
    assert resumed_with(optimizer.state_dict(), prodigy_steps=8)[1].thaw() == []
    optimizer._now.frozen.fill_(1.0)
    assert resumed_with(optimizer.state_dict(), prodigy_steps="auto")[1].thaw() == []


def test_a_d_that_was_fixed_for_its_weight_stays_so_and_continues_bit_for_bit() -> None:
    params = model(torch.float32)
    optimizer = build(params, d_coef=0.5)
    steps(params, optimizer, 0, 20)
    optimizer._now.frozen[0] = FROZEN_FOR_ITS_WEIGHT
    steps(params, optimizer, 20, 34)
    for prodigy_steps in (0, "auto", 200):
        again, resumed = resumed_with(optimizer.state_dict(), d_coef=0.5, prodigy_steps=prodigy_steps)
        assert resumed.thaw() == []
        assert [m.frozen for m in resumed.metrics()] == [True, False]
    again, resumed = resumed_with(optimizer.state_dict(), d_coef=0.5)
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q.detach())
    steps(params, optimizer, 34, 40)
    steps(again, resumed, 34, 40)
    assert all(torch.equal(p, q) for p, q in zip(again, params, strict=True))


def test_a_state_of_before_the_gradients_squares_were_noted_can_be_loaded() -> None:
    params = model(torch.float32)
    optimizer = build(params)
    steps(params, optimizer, 0, 12)
    state = optimizer.state_dict()
    again, resumed = resumed_with({**state, "numbers": state["numbers"][:16]})
    assert torch.equal(resumed.state_dict()["numbers"][:16], state["numbers"][:16])
    assert not any(m.at_zero for m in resumed.metrics()), "it has moved long ago"
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q.detach())
    steps(again, resumed, 12, 14)
    steps(params, optimizer, 12, 14)
    assert all(torch.equal(p, q) for p, q in zip(again, params, strict=True))
    assert torch.equal(resumed.state_dict()["numbers"], optimizer.state_dict()["numbers"])
