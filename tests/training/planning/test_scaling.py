"""How much faster several cards would be: what each computes, and what a ring takes to add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.config.read import resolve
from sdtrain.data.examples import Example
from sdtrain.errors import UserError
from sdtrain.training.planning import scaling
from sdtrain.training.planning.plan import Plan
from sdtrain.training.planning.scaling import (
    ETHERNET,
    INFINIBAND,
    Scaled,
    exchange_s,
    last_worth_it,
    scaled_runs,
    scaling_lines,
)
from sdtrain.training.planning.trace import Phase
from sdtrain.training.ranks.group import Exchanged
from tests.conftest import merged

GB = 10**9


def plan_of(flops: float, exchanged: Exchanged, operations: int = 0, bucket: tuple[int, int] = (96, 96)) -> Plan:
    return Plan("a GPU", bucket, (Phase("train", {"weights": 1}),), {}, int(flops), {}, (), operations, exchanged)


@pytest.fixture
def runs_of(table: dict[str, Any]) -> Callable[..., list[Scaled]]:
    """Reckons a run of 16 pictures a step, of 96 px all but `large` of them, which have four times the pixels."""

    def reckon(plan: Plan, most: int, *, large: int = 0, batch_size: int = 2) -> list[Scaled]:
        data = {"data.batch_size": batch_size, "data.gradient_accumulation": 16 // batch_size, "data.enlarge": True}
        config = resolve(merged(table, data), "test config")
        sides = [192] * large + [96] * (64 - large)
        examples = [
            Example(Path(f"{index}.png"), "a", side, side, repeats=1.0, resolution_px=side)
            for index, side in enumerate(sides)
        ]
        return scaled_runs(config, plan, examples, most)

    return reckon


def test_work_that_exchanges_nothing_is_as_many_times_as_fast(
    runs_of: Callable[..., list[Scaled]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "UPDATE_S", 0.0)
    runs = runs_of(plan_of(16 * scaling.RATE, Exchanged(0, 0)), 16)
    assert [run.cards for run in runs] == [1, 2, 4, 8, 16]
    assert [run.pictures for run in runs] == [16, 8, 4, 2, 1]
    assert [run.compute_s for run in runs] == pytest.approx([16, 8, 4, 2, 1])


def test_what_each_operation_takes_to_launch_is_not_shared_where_each_card_has_one_micro_batch(
    runs_of: Callable[..., list[Scaled]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "UPDATE_S", 0.0)
    monkeypatch.setattr(scaling, "LAUNCH_S", 1.0)
    runs = runs_of(plan_of(0, Exchanged(0, 0), operations=1), 16)
    assert [run.compute_s for run in runs] == pytest.approx([8, 4, 2, 1, 1])  # of two pictures each, then of one


def test_only_numbers_of_cards_that_share_a_step_equally_are_told(runs_of: Callable[..., list[Scaled]]) -> None:
    plan = plan_of(1e15, Exchanged(4, GB))
    assert [run.cards for run in runs_of(plan, 12)] == [1, 2, 4, 8]


@pytest.mark.parametrize(("cards", "seconds"), [(1, 0.0), (2, 2 / 2 / 360), (8, 2 * 7 / 8 / 360)])
def test_within_a_machine_a_ring_goes_over_nvlink(cards: int, seconds: float) -> None:
    for between in (INFINIBAND, ETHERNET):
        assert exchange_s(Exchanged(0, GB), cards, between) == pytest.approx(seconds)


def test_between_machines_all_goes_once_more_through_what_joins_them() -> None:
    within = 2 * 7 / 8 / 360
    assert exchange_s(Exchanged(0, GB), 16, INFINIBAND) == pytest.approx(within + 2 / 2 / 360)
    assert exchange_s(Exchanged(0, GB), 32, ETHERNET) == pytest.approx(within + 2 * 3 / 4 / 2.8)


@given(st.integers(1, 200), st.integers(0, 10**11), st.sampled_from([2, 4, 8, 16, 32, 64]))
def test_more_bytes_more_calls_and_slower_links_take_longer(calls: int, num_bytes: int, cards: int) -> None:
    some = exchange_s(Exchanged(calls, num_bytes), cards, INFINIBAND)
    assert some > 0
    assert exchange_s(Exchanged(calls + 1, num_bytes), cards, INFINIBAND) > some
    assert exchange_s(Exchanged(calls, num_bytes + 10**9), cards, INFINIBAND) > some
    slower = exchange_s(Exchanged(calls, num_bytes), cards, ETHERNET)
    assert slower > some if cards > 8 else slower == some


def test_a_large_bucket_holds_up_the_card_that_has_it(
    runs_of: Callable[..., list[Scaled]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch goes to one card; cut into single pictures, all have more nearly as much to do."""
    monkeypatch.setattr(scaling, "UPDATE_S", 0.0)
    plan = plan_of(16 * scaling.RATE, Exchanged(0, 0))  # a second for a picture of 96 px, four for a large one
    fair = (64 + 3 * 21) / 64 * 16 / 4
    pairs, singles = (runs_of(plan, 4, large=21, batch_size=size)[-1] for size in (2, 1))
    assert fair <= singles.compute_s < pairs.compute_s < 1.5 * fair


def test_it_says_how_far_it_pays(runs_of: Callable[..., list[Scaled]], table: dict[str, Any]) -> None:
    plan = plan_of(0.4 * scaling.RATE, Exchanged(213, 10 * GB), operations=20_000)
    runs = runs_of(plan, 16)
    assert last_worth_it(runs, "Ethernet") == 8 and last_worth_it(runs, "InfiniBand") == 8
    told = scaling_lines(resolve(merged(table, {"data.gradient_accumulation": 8}), "test config"), plan, runs)
    assert list(told) == ["H100 cards", "1 card", *(f"{num} cards" for num in (2, 4, 8, 16)), "pays", "more pictures"]
    assert "over Ethernet" in told["16 cards"] and "over" not in told["8 cards"]
    assert told["pays"].startswith("up to 8 cards: ")
    assert "data.gradient_accumulation = 128 on 16 cards" in told["more pictures"]


def test_a_number_of_cards_that_a_run_could_not_use_is_refused(table: dict[str, Any], tmp_path: Path) -> None:
    from rich.console import Console

    from sdtrain.commands.front.plan import plan_config
    from sdtrain.config.write import config_to_toml

    config = tmp_path / "a.toml"
    config.write_text(config_to_toml(resolve(table, "test config")), encoding="utf-8")
    with pytest.raises(UserError, match=r"fewer than the 3 ranks|3 ranks cannot share"):
        plan_config(config, [], Console(quiet=True), gpus=3)
