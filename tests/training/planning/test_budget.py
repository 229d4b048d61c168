"""Laws of a run's budget: what is given up for it is told, and a step stays the same step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.config.read import resolve
from sdtrain.config.schema import Config
from sdtrain.config.settings.values import memory_bytes
from sdtrain.data.examples import Example
from sdtrain.errors import UserError
from sdtrain.training.planning import budget
from sdtrain.training.planning.budget import Expected, expected
from sdtrain.training.planning.plan import Plan, lines_of
from sdtrain.training.planning.trace import Phase

Train = Callable[..., tuple[Path, str]]
MIB, CPU = 2**20, torch.device("cpu")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


def of(config: Config, *_: object) -> Plan:
    """A plan by a formula: 10 MiB a picture and 1 MiB beside; 2 MiB of a preview are the U-Net's, which may leave."""
    train = Phase("train", {"weights": MIB, "kept for backward": config.data.batch_size * 10 * MIB})
    return Plan("a CPU", (96, 96), (train, Phase("preview", {"weights": 50 * MIB}, 49 * MIB)), {}, 7)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs that were planned, by the formula."""
    asked: list[Config] = []
    monkeypatch.setattr(budget, "plan_run", lambda config, *_: (asked.append(config), of(config))[1])
    return asked


def test_a_run_gives_up_what_its_budget_takes_and_its_steps_stay_the_same(train: Train, planned: list[Config]) -> None:
    """The same pictures with the same draws; only the sum of their losses is rounded elsewhere."""
    whole = {"data.batch_size": 2, "steps": 3}
    straight, _ = train({"name": "straight", **whole})
    assert not planned, "who asks for no budget on a CPU waits for no plan"
    run, text = train({"name": "tight", **whole, "memory.budget": "14MB"})
    assert "memory.budget = 14MB: data.batch_size=1, data.gradient_accumulation=2" in text
    assert "planned: 11.0 MiB to train, 50.0 MiB to preview" in text
    assert losses(run) == pytest.approx(losses(straight), rel=1e-5)
    assert "batch_size = 1" in (run / "config.toml").read_text()
    again, text = train({"name": "tight", **whole, "steps": 4, "memory.budget": "14MB"}, resume=True)
    assert len(losses(again)) == 4 and len(planned) == 3, "what was planned before is remembered"


def test_plans_are_remembered_by_all_that_they_follow_from(
    table: dict[str, Any], planned: list[Config], tmp_path: Path
) -> None:
    config = resolve(table | {"memory": {"budget": "1GB"}}, "test config")
    examples = [Example(Path("a.png"), "a", 96, 96, repeats=1)]

    def asks(one: Config, base: str = "base") -> bool:
        before = len(planned)
        found = expected(one, None, examples, base, CPU)  # type: ignore[arg-type]  # whose plan is a formula
        assert found.plan == of(one)
        return len(planned) > before

    assert asks(config) and not asks(config)
    assert not asks(config.model_copy(update={"name": "other", "steps": 9}))
    assert asks(config, "another model")
    assert asks(config.model_copy(update={"data": config.data.model_copy(update={"batch_size": 1})}))
    (tmp_path / "cache" / "plans.json").write_text('{"x": {"phases": 3}}')
    assert asks(config), "a file that holds no plans is no reason to fail"


@pytest.mark.parametrize(
    ("ranks", "parallel", "settings"),
    [
        (1, {}, ["memory.fused_back_pass=true"]),
        (2, {}, []),
        (2, {"kind": "ddp"}, ["memory.gradient_checkpointing=true"]),
        (4, {"replicas": 4}, ["memory.gradient_checkpointing=true"]),
        (4, {"replicas": 2}, []),
        (2, {"offload": True}, []),
    ],
)
def test_a_budget_is_that_of_each_card_of_a_split_run(
    table: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    parallel: dict[str, Any],
    settings: list[str],
) -> None:
    """80 MiB are trained: half of them fit beside the rest, all of them do not; no levers that several refuse."""

    def full(config: Config, *_: object) -> Plan:
        saved = config.memory.gradient_checkpointing or config.memory.fused_back_pass
        train = Phase("train", {"trained": 80 * MIB, "kept for backward": 0 if saved else 40 * MIB})
        encode = Phase("encode", {"weights": MIB})
        return Plan("a CPU", (96, 96), (encode, train), {}, 7, trained_bytes=80 * MIB)

    monkeypatch.setattr(budget, "plan_run", full)
    method = {"kind": "full", "train": ["unet"]}
    asked = table | {"method": method, "parallel": parallel, "memory": {"budget": "100MB"}}
    config = resolve(asked, "test config")
    found = expected(config, None, [Example(Path("a.png"), "a", 96, 96, repeats=1)], "base", CPU, ranks)  # type: ignore[arg-type]
    assert found.notes == ((f"memory.budget = 100MB: {', '.join(settings)}", *found.notes[1:]) if settings else ())
    assert found.plan == full(found.config), "which is that of all, as it is judged"
    share = 0 if parallel.get("offload") else 40 if not settings else 80
    assert f"{share + (0 if settings else 40):.1f} MiB to train" in found.line()
    each = found.plan.of_each(found.processes, offload=found.config.parallel.offload)
    away = "the other cards and the host hold" if parallel.get("offload") else "the other cards hold"
    assert (f"less {80 - share:.1f} MiB that {away}" in lines_of(each)["train"]) == (
        not settings and found.processes > 1
    )


@pytest.mark.usefixtures("planned")
def test_a_budget_that_nothing_fits_is_told_before_anything_is_written(train: Train, table: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        train({"memory.budget": "1MB", "data.batch_size": 1, "data.resolution_px": 64})
    (problem,) = caught.value.problems
    assert problem.where == "memory.budget" and "1.0 MiB are too little" in problem.what
    assert not list(Path(table["output"]).glob("*/config.toml"))


def test_auto_asks_a_card_and_there_is_none(train: Train) -> None:
    with pytest.raises(UserError, match="auto asks the card how much memory it has, and this run computes on the CPU"):
        train({"memory.budget": "auto"})


@pytest.mark.parametrize("text", ["8", "much", "", "0GB", "off "])
def test_what_is_no_budget_is_refused(table: dict[str, Any], text: str) -> None:
    assert not memory_bytes(text)
    with pytest.raises(UserError, match="off, auto, or the size of a memory such as 8GB"):
        resolve(table | {"memory": {"budget": text}}, "test config")


@pytest.mark.parametrize(("measured", "is_told"), [(4000, False), (5400, False), (5600, True)])
def test_a_peak_more_than_a_tenth_above_the_plan_is_told_with_both(
    table: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    measured: int,
    is_told: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: measured * MIB)
    config = resolve(table, "test config")
    large = Plan("a GPU", (96, 96), (Phase("train", {"weights": 5000 * MIB}),), {}, 7)
    text = Expected(config, large).judged(torch.device("cuda"))
    assert text.startswith(f"{measured / 1024:.2f} GiB at most, 4.88 GiB planned")
    assert ("12% more than planned" in text) == is_told
    assert not Expected(config, large).judged(CPU), "where the process holds much else"


@pytest.mark.parametrize(("measured", "is_told"), [(300, False), (310, True)])
def test_what_the_libraries_of_a_card_keep_for_themselves_is_no_surprise_of_a_small_run(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch, measured: int, is_told: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: measured * MIB)
    config = resolve(table, "test config")
    text = Expected(config, of(config)).judged(torch.device("cuda"))
    assert ("more than planned" in text) == is_told
