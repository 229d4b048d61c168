"""The step size d: how it rises, falls and freezes, formula by formula."""

from typing import Any

import pytest
import torch
from torch import nn

from optim import ProdigyPlusScheduleFree
from optim.formulas.numbers import GroupValues, Numbers
from optim.formulas.prodigy import end_step


def after(num: float, den: float, d: float = 1e-3, r: float = 0.0, **settings: Any) -> float:
    """d after one step with these sums, from this d and r (d0 = 1e-6)."""
    optimizer = ProdigyPlusScheduleFree([nn.Parameter(torch.zeros(2))], **settings)
    buffer = Numbers.start(1e-6, torch.device("cpu"))
    now = Numbers.of(buffer)
    now.d.fill_(d)
    now.numerator.fill_(r)
    one = torch.ones(1, dtype=torch.float64)
    values = GroupValues(
        lr=one,
        weight_decay=0 * one,
        d0=1e-6 * one,
        d_coef=settings.get("d_coef", 1.0) * one,
        initial_lr=one,
        any_weighed="d_coef" in settings,
    )
    sums = torch.tensor([[num, den]], dtype=torch.float64)
    true = torch.ones((), dtype=torch.bool)
    end_step(now, sums, true.expand(1), values, optimizer.settings, true)
    return float(now.d)


def test_d_takes_over_a_larger_estimate() -> None:
    assert after(1.1e-3, 1.0) == pytest.approx(1.1e-3)


def test_d_never_falls_with_beta4_0() -> None:
    assert after(0.5e-3, 1.0) == 1e-3


def test_the_limiter_holds_growth_to_the_fourth_root_of_2() -> None:
    assert after(1.0, 1.0) == pytest.approx(2**0.25 * 1e-3)
    assert after(1.0, 1.0, d_limiter=False) == pytest.approx(1.0)


def test_d_coef_leaves_the_estimate_and_its_limit_as_they_are() -> None:
    assert after(1.0, 1.0, d_coef=2.0) == pytest.approx(2**0.25 * 1e-3)
    assert after(1.1e-3, 1.0, d_coef=0.25) == pytest.approx(1.1e-3)


def test_positive_beta4_averages_both_ways() -> None:
    assert after(0.5e-3, 1.0, beta4=0.9) == pytest.approx(0.95e-3)
    assert after(1.1e-3, 1.0, beta4=0.9) == pytest.approx(1.01e-3)


def test_negative_beta4_averages_only_on_the_way_down() -> None:
    assert after(0.5e-3, 1.0, beta4=-0.9) == pytest.approx(0.95e-3)
    assert after(1.1e-3, 1.0, beta4=-0.9) == pytest.approx(1.1e-3)


def test_beta4_none_is_beta2() -> None:
    assert after(0.5e-3, 1.0, beta4=None) == pytest.approx(0.99e-3 + 0.01 * 0.5e-3)


def test_d_never_leaves_d0_downwards() -> None:
    assert after(-1.0, 1.0, beta4=0.5, d=1.5e-6) == pytest.approx(1e-6)


def test_without_a_denominator_d_stays() -> None:
    assert after(1.0, 0.0) == 1e-3


def test_at_d0_a_negative_numerator_is_left_out() -> None:
    assert after(-1.0, 1.0, d=1e-6, r=1.1e-6) == pytest.approx(1.1e-6 * 0.99**0.5)


def bowl(steps: int, **settings: Any) -> tuple[nn.Parameter, ProdigyPlusScheduleFree, list[tuple[float, bool]]]:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(20, 60, generator=generator))
    optimizer = ProdigyPlusScheduleFree([{"params": [p], "name": "unet"}], **settings)
    seen = []
    for _ in range(steps):
        p.grad = (p.detach() - 2) * 0.1 + 0.02 * torch.randn(p.shape, generator=generator)
        optimizer.step()
        seen.append((optimizer.metrics()[0].d, optimizer.metrics()[0].frozen))
    return p, optimizer, seen


def test_a_number_of_prodigy_steps_freezes_d_and_frees_what_estimated_it() -> None:
    p, optimizer, seen = bowl(40, prodigy_steps=20)
    d = [value for value, _ in seen]
    assert d[17] > d[10] and len(set(d[19:])) == 1
    assert not {"p0", "s"} & set(optimizer.state[p])
    p, optimizer, _ = bowl(10, prodigy_steps=20)
    assert {"p0", "s"} <= set(optimizer.state[p])


def test_auto_freezes_once_d_has_stopped_growing_and_not_before() -> None:
    p, optimizer, seen = bowl(400, prodigy_steps="auto")
    first = next(step for step, (_, frozen) in enumerate(seen) if frozen)
    assert 100 < first < 399
    assert seen[first][0] <= 1.03 * seen[first - 100][0]
    assert seen[first][0] > 100 * 1e-6
    assert len({d for d, frozen in seen if frozen}) == 1
    assert not {"p0", "s"} & set(optimizer.state[p])


def test_auto_does_not_freeze_a_d_that_never_grew() -> None:
    p = nn.Parameter(torch.zeros(4, 40))
    optimizer = ProdigyPlusScheduleFree([p], prodigy_steps="auto")
    for _ in range(150):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert not optimizer.metrics()[0].frozen


def test_the_mean_over_groups_is_applied_and_each_group_still_estimates_its_own() -> None:
    means = {"harmonic_mean": lambda a, b: 2 / (1 / a + 1 / b), "geometric_mean": lambda a, b: (a * b) ** 0.5,
             "mean": lambda a, b: (a + b) / 2}  # fmt: skip
    for name, mean in means.items():
        params = [nn.Parameter(torch.full((4, 40), 0.1)), nn.Parameter(torch.full((4, 40), 0.1))]
        groups = [{"params": [params[0]], "name": "unet"}, {"params": [params[1]], "name": "text"}]
        optimizer = ProdigyPlusScheduleFree(groups, split_groups_mean=name)
        for step in range(30):
            before = [m.d for m in optimizer.metrics()]
            params[0].grad = torch.ones(4, 40)
            params[1].grad = torch.ones(4, 40) * (-1) ** step
            optimizer.step()
        now = optimizer.metrics()
        assert now[0].d > 5 * now[1].d
        assert now[0].applied_d == now[1].applied_d == pytest.approx(mean(*before))


def test_effective_lr_is_what_y_moves_by() -> None:
    p, optimizer, _ = bowl(30, d0=1e-4)
    before, z = p.detach().clone(), optimizer.state[p]["z"].clone()
    p.grad = torch.full_like(p, 1e6)
    optimizer.step()
    m = optimizer.metrics()[0]
    c = float(optimizer._now.weight)
    u = (z - optimizer.state[p]["z"]) / (m.applied_d * m.lr)
    torch.testing.assert_close(p.detach(), before + c * (z - before) - m.effective_lr * u, rtol=0, atol=1e-5)


def two_bowls(steps: int, *, stop: int = 0, **settings: Any) -> ProdigyPlusScheduleFree:
    """Two networks of equal bowls; the second one is no longer trained after `stop` steps."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(20, 60, generator=generator)) for _ in range(2)]
    groups = [{"params": [params[0]], "name": "unet"}, {"params": [params[1]], "name": "text"}]
    optimizer = ProdigyPlusScheduleFree(groups, **settings)
    for step in range(steps):
        for p in params if not stop or step < stop else params[:1]:
            p.grad = p.detach() - 2
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("mean", ["harmonic_mean", "geometric_mean", "mean"])
def test_a_group_that_is_no_longer_trained_leaves_the_mean_and_is_shown_as_inactive(mean: Any) -> None:
    unet, text = two_bowls(60, stop=5, split_groups_mean=mean).metrics()
    assert unet.active and not text.active
    assert text.effective_lr == 0.0 and text.d < 1e-5
    assert unet.applied_d == pytest.approx(unet.d, rel=0.2), "only its own d is left to average"
    assert unet.d > 1e-2


def test_the_state_of_an_inactive_group_stays_when_nobody_takes_part() -> None:
    optimizer = two_bowls(10)
    before = optimizer._now.applied_d.clone()
    optimizer.step()
    assert torch.equal(optimizer._now.applied_d, before)
    assert [now.active for now in optimizer.metrics()] == [False, False]


@pytest.mark.parametrize("setting", ["lr", "d_coef"])
@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("mean", ["harmonic_mean", None])
def test_lr_and_d_coef_multiply_the_step_that_is_found_without_them(setting: str, factor: float, mean: Any) -> None:
    one = two_bowls(140, split_groups_mean=mean).metrics()
    weighed = two_bowls(140, split_groups_mean=mean, **{setting: factor}).metrics()
    for before, after_it in zip(one, weighed, strict=True):
        assert before.d > 1e-2 and not before.climbing
        assert after_it.effective_lr == pytest.approx(factor * before.effective_lr, rel=0.25)
        assert after_it.d == pytest.approx((factor if setting == "d_coef" else 1) * before.d, rel=0.25)


def test_a_weight_does_not_change_what_a_step_counts_for_in_the_average() -> None:
    one, weighed = two_bowls(140), two_bowls(140, lr=0.1)
    assert weighed._now.weight.tolist() == pytest.approx(one._now.weight.tolist(), rel=0.25)


def test_a_schedule_of_lr_holds_while_d_climbs_too() -> None:
    p = nn.Parameter(torch.ones(4, 40))
    optimizer = ProdigyPlusScheduleFree([p], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 4)
    seen = []
    for _ in range(3):
        p.grad = torch.ones(4, 40)
        optimizer.step()
        schedule.step()
        seen.append(float(optimizer._now.applied_lr))
    assert seen == [0.25, 0.5, 0.75], "the schedule's share, without the weight of 0.5"


def test_auto_freezes_no_sooner_than_told() -> None:
    _, _, seen = bowl(300, prodigy_steps="auto", freeze_after=250)
    first = next(step for step, (_, frozen) in enumerate(seen) if frozen)
    assert first == 249


def test_a_d_that_is_fixed_while_it_climbs_says_so() -> None:
    _, climbing, _ = bowl(30, prodigy_steps=12)
    _, resting, _ = bowl(200, prodigy_steps=180)
    assert climbing.metrics()[0].frozen and climbing.metrics()[0].climbing
    assert resting.metrics()[0].frozen and not resting.metrics()[0].climbing


def test_the_d_of_a_weighed_group_is_fixed_at_its_first_rest_and_the_others_go_on() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(20, 60, generator=generator)) for _ in range(2)]
    groups = [{"params": [params[0]], "name": "unet", "lr": 0.1}, {"params": [params[1]], "name": "text"}]
    optimizer = ProdigyPlusScheduleFree(groups, split_groups_mean=None)
    applied, fixed = [], []
    for _ in range(140):
        for p in params:
            p.grad = p.detach() - 2
        optimizer.step()
        applied.append(float(optimizer._now.applied_lr[0]))
        fixed.append(optimizer.metrics()[0].frozen)
    unet, text = optimizer.metrics()
    assert unet.frozen and unet.settled and not text.frozen
    assert applied == [0.1 if was_fixed else 1.0 for was_fixed in [False, *fixed[:-1]]], "weight 1 until d is fixed"
    climbed = int(optimizer._now.climb_k[0])
    assert fixed.index(True) + 2 == climbed + max(40, -(-climbed // 2)), "after 40 steps, or half of the climb, at rest"
    assert optimizer.thaw() == [], "what was fixed for its weight stays fixed"
    assert not {"p0", "s"} & set(optimizer.state[params[0]]) and "s" in optimizer.state[params[1]]


@pytest.mark.parametrize(("d0", "first"), [(1e-6, 100), (1e-5, 0)], ids=["never grew", "was given its d"])
def test_a_weight_holds_without_a_climb_after_a_hundred_steps_or_at_once_where_d_was_given(
    d0: float, first: int
) -> None:
    p = nn.Parameter(torch.ones(4, 40))
    optimizer = ProdigyPlusScheduleFree([{"params": [p], "lr": 0.5, "d0": d0}])
    applied = []
    for _ in range(104):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        applied.append(float(optimizer._now.applied_lr))
    assert applied == [1.0] * first + [0.5] * (104 - first)
    assert not optimizer.metrics()[0].frozen


def test_one_d_for_all_is_fixed_for_all_when_one_of_them_is_weighed() -> None:
    params = [nn.Parameter(torch.full((20, 60), 3.0)) for _ in range(2)]
    groups = [{"params": [params[0]], "name": "unet", "lr": 0.5}, {"params": [params[1]], "name": "text"}]
    optimizer = ProdigyPlusScheduleFree(groups, split_groups=False)
    for _ in range(140):
        for p in params:
            p.grad = p.detach() - 2
        optimizer.step()
    unet, text = optimizer.metrics()
    assert unet.frozen and text.frozen and unet.d == text.d


@pytest.mark.parametrize("fused", [False, True])
def test_the_length_of_a_gradient_is_shown_and_what_began_at_zero_and_stayed_there(fused: bool) -> None:
    down, up, other = (nn.Parameter(torch.full((4, 40), value)) for value in (1.0, 0.0, 1.0))
    groups = [{"params": [down, up], "name": "unet"}, {"params": [other], "name": "text"}]
    optimizer = ProdigyPlusScheduleFree(groups, fused_back_pass=fused)

    def step(scale: float) -> None:
        ((3 * down + scale * up).sum() + 0 * other.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0.0)
    unet, text = optimizer.metrics()
    assert unet.gradient == pytest.approx(3 * 160**0.5) and unet.at_zero
    assert text.gradient == 0 and text.active and not text.at_zero, "nothing of it began at zero"
    step(float("inf"))
    assert optimizer.metrics()[0].at_zero and optimizer.metrics()[0].skipped == 1
    step(4.0)
    assert optimizer.metrics()[0].gradient == pytest.approx(5 * 160**0.5) and not optimizer.metrics()[0].at_zero
    step(0.0)
    assert not optimizer.metrics()[0].at_zero, "it has moved once"
