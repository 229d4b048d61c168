"""The step size of real runs: weights and d_coef are factors, who is not trained is not averaged, a freeze waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
FIXED = {"optimizer.prodigy_steps": 80}
"""A d that is never fixed may climb once more, and then a weight waits again: the laws of weights are of a fixed d."""
MEANS = ["harmonic_mean", "off"]


def end_of(train: Train, name: str, steps: int, changes: dict[str, Any]) -> Groups:
    """What the log says of each network in the last step."""
    run, _ = train(changes | {"name": name, "steps": steps})
    groups: Groups = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["groups"]
    return groups


def require_weight(one: Groups, weighed: Groups, name: str, weight: float) -> None:
    """Asserts that the step of `name` is weighed, and that no other network's d was moved."""
    assert weighed[name]["effective_lr"] == pytest.approx(weight * one[name]["effective_lr"], rel=0.25)
    for other in set(one) - {name}:
        assert weighed[other]["d"] == pytest.approx(one[other]["d"], rel=0.1), other


def test_the_lr_of_a_network_weighs_its_step_and_moves_no_other_networks_d(train: Train) -> None:
    settings = SETTINGS | FIXED | {"method.train": ALL}
    one = end_of(train, "one", 110, settings)
    assert one["text_encoder"]["d"] > 1e-3, "d must have climbed, or this shows nothing"
    weighed = end_of(train, "weighed", 110, settings | {"method.lr": {"text_encoder": 0.1}})
    require_weight(one, weighed, "text_encoder", 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mean", MEANS)
def test_the_lr_of_a_network_weighs_its_step_on_the_quickstarts_pictures(train: Train, mean: str, seed: int) -> None:
    settings = SETTINGS | FIXED | {"method.train": ALL, "optimizer.split_groups_mean": mean, "seed": seed}
    one = end_of(train, "one", 120, settings)
    for weight in (0.1, 0.5, 2.0):
        weighed = end_of(train, f"{weight}", 120, settings | {"method.lr": {"text_encoder": weight}})
        require_weight(one, weighed, "text_encoder", weight)


def test_d_coef_is_a_factor_of_d(train: Train) -> None:
    one = end_of(train, "one", 100, SETTINGS)["unet"]["d"]
    assert one > 1e-3
    less = end_of(train, "less", 100, SETTINGS | {"optimizer.d_coef": 0.25})
    assert less["unet"]["d"] == pytest.approx(0.25 * one, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0])
def test_d_coef_is_a_factor_of_d_on_the_quickstarts_pictures(train: Train, factor: float, seed: int) -> None:
    one = end_of(train, "one", 200, SETTINGS | {"seed": seed})["unet"]["d"]
    other = end_of(train, "other", 200, SETTINGS | {"seed": seed, "optimizer.d_coef": factor})["unet"]["d"]
    assert other == pytest.approx(factor * one, rel=0.25)


def test_a_network_beside_stopped_ones_finds_the_d_it_finds_alone(train: Train) -> None:
    alone = end_of(train, "alone", 40, SETTINGS)
    stop = {"text_encoder": 5, "text_encoder_2": 5}
    beside = end_of(train, "beside", 40, SETTINGS | {"method.train": ALL, "method.stop": stop})
    assert alone["unet"]["d"] > 5e-5
    assert beside["unet"]["applied_d"] == pytest.approx(alone["unet"]["applied_d"], rel=0.1)
    for name in stop:
        assert beside[name]["stopped"] and beside[name]["effective_lr"] == 0


def test_a_preset_does_not_freeze_a_d_that_climbs_and_says_so_where_the_run_ends_too_soon(
    train: Train, table: dict[str, Any]
) -> None:
    table["optimizer"] = {}
    settings = {key: value for key, value in SETTINGS.items() if key != "optimizer.d0"}
    run, said = train(settings | {"name": "short", "steps": 24})
    groups = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["groups"]
    assert not groups["unet"]["frozen"]
    assert "d was still climbing when the run ended: unet" in said and "larger optimizer.d0" in said
    _, said = train(settings | {"name": "short", "steps": 48}, resume=True)
    assert json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["groups"]["unet"]["d"] > 1e-4
    assert "estimated again" not in said


@pytest.mark.slow
def test_runs_of_any_length_find_the_same_d_or_say_why_not(train: Train, table: dict[str, Any]) -> None:
    table["optimizer"] = {}
    settings = {key: value for key, value in SETTINGS.items() if key != "optimizer.d0"}
    found = {}
    for steps in (20, 40, 80, 200, 400):
        run, said = train(settings | {"name": f"of-{steps}", "steps": steps})
        d = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["groups"]["unet"]["d"]
        found[steps] = (d, "d was still climbing when the run ended" in said)
    longest = found[400][0]
    assert longest > 1e-3
    assert all(told or longest / 2 < d < longest * 2 for d, told in found.values()), found


def test_a_d_that_was_frozen_while_it_climbed_is_told_of_and_goes_on_when_asked(train: Train) -> None:
    settings = SETTINGS | {"name": "frozen"}
    run, said = train(settings | {"steps": 30, "optimizer.prodigy_steps": 20})
    assert "d was still climbing when optimizer.prodigy_steps froze it: unet" in said
    frozen = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["groups"]["unet"]["d"]
    _, said = train(settings | {"steps": 50, "optimizer.prodigy_steps": "auto"}, resume=True)
    assert "d of unet was frozen and is estimated again from step 30 on" in said
    thawed = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["groups"]["unet"]["d"]
    assert thawed > 2 * frozen


def test_a_timestep_beyond_the_models_schedule_is_refused(train: Train) -> None:
    from sdtrain.errors import UserError

    with pytest.raises(UserError, match="timesteps are 0 to 999; 1000 in other trainers counts them, 999 is the last"):
        train({"timesteps.last": 1000})
    with pytest.raises(UserError, match="1005 is beyond the model's noise schedule"):
        train({"timesteps.last": 1005})
    train({"timesteps.first": 990, "timesteps.last": 999})
