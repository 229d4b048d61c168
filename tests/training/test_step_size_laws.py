"""The step size of real runs: weights and d_coef are factors, who is not trained is not averaged, a freeze waits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtrain.config import presets
from sdtrain.config.presets import d_coef_of
from sdtrain.config.read import resolve
from tests.conftest import merged

Train = Callable[..., tuple[Path, str]]
Groups = dict[str, dict[str, float]]
ALL = ["unet", "text_encoder", "text_encoder_2"]
SETTINGS = {
    "data.folder": [{"path": "builtin:quickstart"}],
    "data.resolution_px": 64,
    "data.batch_size": 1,
    "method.rank": 4,
    "optimizer.d0": 1e-6,
}
MEANS = ["harmonic_mean", "off"]
PRESETS = ["lora", "never-freeze"]
SOONER = {"optimizer.d0": 1e-4}
"""d climbs for 30 to 60 steps from here, so that it is at rest after 100."""


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The log of a run: a line per step, and one per note."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def last_step(run: Path) -> Groups:
    """What the log says of each network in the last step."""
    groups: Groups = [line for line in lines_of(run) if "groups" in line][-1]["groups"]
    return groups


def end_of(train: Train, name: str, steps: int, changes: dict[str, Any]) -> Groups:
    """What the log says of each network in the last step of a run."""
    run, _ = train(changes | {"name": name, "steps": steps})
    return last_step(run)


def require_weight(one: Groups, weighed: Groups, name: str, weight: float, moved: float = 1.1) -> None:
    """Asserts that the step of `name` is weighed, and that no other network's d was moved by more than a factor."""
    assert one[name]["d"] > 1e-3, "d must have climbed, or this shows nothing"
    assert weighed[name]["effective_lr"] == pytest.approx(weight * one[name]["effective_lr"], rel=0.25)
    assert weighed[name]["frozen"]
    for other in set(one) - {name}:
        assert 1 / moved <= weighed[other]["d"] / one[other]["d"] <= moved, other


def test_the_lr_of_a_network_weighs_its_step_and_moves_no_other_networks_d(train: Train) -> None:
    settings = SETTINGS | SOONER | {"method.train": ALL, "optimizer.split_groups_mean": "harmonic_mean"}
    one = end_of(train, "one", 85, settings)
    weighed = end_of(train, "weighed", 85, settings | {"method.lr": {"text_encoder": 0.1}})
    require_weight(one, weighed, "text_encoder", 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_lr_of_a_network_weighs_its_step_on_the_quickstarts_pictures(
    train: Train, table: dict[str, Any], preset: str, mean: str, seed: int
) -> None:
    table["optimizer"] = {}
    settings = SETTINGS | SOONER | {"method.train": ALL, "optimizer.preset": preset, "seed": seed}
    settings["optimizer.split_groups_mean"] = mean
    one = end_of(train, "one", 200, settings)
    grows = preset == "never-freeze" and mean == "off"  # each d to the end, by other gradients, as far as they bring it
    for name, weight in (("text_encoder", 0.1), ("text_encoder", 0.5), ("text_encoder", 2.0), ("unet", 0.1)):
        weighed = end_of(train, f"{name}-{weight}", 200, settings | {"method.lr": {name: weight}})
        require_weight(one, weighed, name, weight, moved=math.inf if grows else 1.1)


def test_d_coef_is_a_factor_of_d(train: Train) -> None:
    one = end_of(train, "one", 100, SETTINGS | SOONER | {"optimizer.d_coef": 1.0})["unet"]["d"]
    assert one > 1e-3
    less = end_of(train, "less", 100, SETTINGS | SOONER | {"optimizer.d_coef": 0.25})
    assert less["unet"]["d"] == pytest.approx(0.25 * one, rel=0.25)


@pytest.mark.parametrize(
    ("steps", "factor"),
    [(1, 2.0), (100, 2.0), (200, 2**0.5), (400, 1.0), (500, 0.8), (1600, 0.25), (10**6, 0.25)],
)
def test_a_longer_run_applies_less_of_d(table: dict[str, Any], steps: int, factor: float) -> None:
    config = resolve(merged(table, {"steps": steps, "optimizer": {}}), "test config")
    assert d_coef_of(config) == pytest.approx(factor)
    fixed = resolve(merged(table, {"steps": steps, "optimizer": {"d_coef": 2.0}}), "test config")
    assert d_coef_of(fixed) == 2.0
    never = resolve(merged(table, {"steps": steps, "optimizer": {"preset": "never-freeze"}}), "test config")
    assert d_coef_of(never) == 1.0


def test_a_run_that_is_made_longer_goes_on_in_the_steps_of_a_long_one(
    train: Train, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "WHOLE_D_STEPS", 2)
    table["optimizer"] = {}

    def factor_of(changes: dict[str, Any], *, resume: bool = False) -> float:
        records: list[Any] = []
        _, told = train(SETTINGS | changes, resume=resume, watchers=[records.append])
        (weight,) = {group.weight for record in records for group in getattr(record, "groups", ())}
        found = re.search(r"(\S+) x d is applied", " ".join(told.split()))
        assert weight == (float(found[1]) if found else 1.0)
        assert records[0].usual_weight == (1.0 if "optimizer.d_coef" in changes else weight)
        return float(weight)

    assert factor_of({"steps": 2}) == 1.0
    assert factor_of({"steps": 4}, resume=True) == 0.5
    assert factor_of({"steps": 4, "name": "at-once"}) == 0.5
    assert factor_of({"steps": 6, "optimizer.d_coef": 0.25}, resume=True) == 0.25, "who chooses one has it"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0])
def test_d_coef_is_a_factor_of_d_on_the_quickstarts_pictures(train: Train, factor: float, seed: int) -> None:
    settings = SETTINGS | SOONER | {"seed": seed, "optimizer.d_coef": 1.0}
    one = end_of(train, "one", 200, settings)["unet"]["d"]
    other = end_of(train, "other", 200, settings | {"optimizer.d_coef": factor})["unet"]["d"]
    assert other == pytest.approx(factor * one, rel=0.25)


def test_a_network_beside_stopped_ones_finds_the_d_it_finds_alone(train: Train) -> None:
    settings = SETTINGS | {"optimizer.d0": 2e-5}  # sooner than it can be useful, a stop is refused
    alone = end_of(train, "alone", 30, settings)
    stop = {"text_encoder": 5, "text_encoder_2": 5}
    beside = end_of(train, "beside", 30, settings | {"method.train": ALL, "method.stop": stop})
    assert alone["unet"]["d"] > 2e-4
    assert beside["unet"]["applied_d"] == pytest.approx(alone["unet"]["applied_d"], rel=0.1)
    for name in stop:
        assert beside[name]["stopped"] and beside[name]["effective_lr"] == 0


def test_a_preset_does_not_freeze_a_d_that_climbs_and_says_so_where_the_run_ends_too_soon(
    train: Train, table: dict[str, Any]
) -> None:
    table["optimizer"] = {"freeze_share": 0.25, "prodigy_steps": "auto"}
    run, said = train(SETTINGS | {"name": "short", "steps": 24})
    assert not last_step(run)["unet"]["frozen"]
    note = "note: d of unet was still climbing when the run ended, at "
    assert note in said and "larger optimizer.d0" in said
    assert [line["step"] for line in lines_of(run) if line.get("note", "").startswith(note)] == [24]
    _, said = train(SETTINGS | {"name": "short", "steps": 48}, resume=True)
    assert last_step(run)["unet"]["d"] > 1e-4
    assert "estimated again" not in said


@pytest.mark.slow
def test_runs_of_any_length_find_the_same_d_or_say_why_not(train: Train, table: dict[str, Any]) -> None:
    table["optimizer"] = {}
    settings = {key: value for key, value in SETTINGS.items() if key != "optimizer.d0"} | {"optimizer.d_coef": 1.0}
    found = {}
    for steps in (20, 40, 80, 200, 400):
        run, said = train(settings | {"name": f"of-{steps}", "steps": steps})
        found[steps] = (last_step(run)["unet"]["d"], "d of unet was still climbing when the run ended" in said)
    longest = found[400][0]
    assert longest > 1e-3
    assert all(told or longest / 2 < d < longest * 2 for d, told in found.values()), found
    assert not found[80][1], "80 steps are enough"


@pytest.mark.slow
def test_the_d_that_is_found_does_not_depend_on_d0(train: Train) -> None:
    found = [end_of(train, f"{d0}", 200, SETTINGS | {"optimizer.d0": d0})["unet"]["d"] for d0 in (1e-6, 1e-5, 1e-4)]
    assert min(found) > 1e-3
    assert max(found) < 2 * min(found)


def test_a_d_that_was_frozen_while_it_climbed_is_told_of_and_goes_on_when_asked(train: Train) -> None:
    settings = SETTINGS | {"name": "frozen"}
    run, said = train(settings | {"steps": 30, "optimizer.prodigy_steps": 20})
    note = "d of unet was still climbing when optimizer.prodigy_steps froze it"
    assert said.count(note) == 1
    assert [line["step"] for line in lines_of(run) if note in line.get("note", "")] == [20]
    frozen = last_step(run)["unet"]["d"]
    _, said = train(settings | {"steps": 50, "optimizer.prodigy_steps": "auto"}, resume=True)
    assert "d of unet was frozen and is estimated again from step 30 on" in said
    assert last_step(run)["unet"]["d"] > 2 * frozen


def test_networks_that_nothing_reaches_are_told_of_in_the_terminal_and_in_the_log(train: Train) -> None:
    dropped = {"data.caption_dropout": 1.0, "model.no_caption": "zeros", "method.train": ALL, "steps": 11}
    run, said = train(dropped)
    for name in ("text_encoder", "text_encoder_2"):
        note = f"note: {name} got no gradient in 10 steps, so it does not learn"
        assert said.count(note) == 1
        assert [line["step"] for line in lines_of(run) if line.get("note", "").startswith(note)] == [10]
        assert "stopped" not in last_step(run)[name]
    assert "unet got no gradient" not in said


def test_a_timestep_beyond_the_models_schedule_is_refused(train: Train) -> None:
    from sdtrain.errors import UserError

    with pytest.raises(UserError, match="timesteps are 0 to 999; 1000 in other trainers counts them, 999 is the last"):
        train({"timesteps.last": 1000})
    with pytest.raises(UserError, match="1005 is beyond the model's noise schedule"):
        train({"timesteps.last": 1005})
    train({"timesteps.first": 990, "timesteps.last": 999})
