"""The benchmark of the default presets: what it compares, and how."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # its files import one another, as they do when they are run

import bench_defaults as bench  # noqa: E402
import bench_results as results  # noqa: E402
import bench_tasks as tasks  # noqa: E402
import plot_defaults  # noqa: E402

from sdtrain.training.run import generator_of  # noqa: E402

CONTESTANTS = (
    "adamw lr=0.001 schedule=cosine",
    "schedulefree lr=0.001",
    "prodigyopt schedule=constant",
    "prodigy-plus",
    "ours",
)


def result(contestant: str, loss: float, seed: int = 0, steps: int = 100, task: str = "concept") -> results.Result:
    return results.Result(
        task, contestant, steps, seed, loss, loss, 0.5, [[steps, loss]], [[steps, 1e-3]], {}, {}, 1.0, "unet", "c", "v"
    )  # fmt: skip


# ---- arithmetic ----


def test_a_standard_error_is_that_of_the_mean() -> None:
    mean, error = results.mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2)
    assert math.isnan(results.mean_and_error([1.0])[1])


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-0.1, 0.1)), min_size=2, max_size=6),
    st.floats(-1, 1),
)
def test_what_a_seed_adds_to_both_does_not_count_in_a_paired_difference(
    pairs: list[tuple[float, float]], added: float
) -> None:
    ours = {seed: hardness + difference for seed, (hardness, difference) in enumerate(pairs)}
    theirs = {seed: hardness for seed, (hardness, _) in enumerate(pairs)}
    mean, error, num = results.paired_difference(ours, theirs)
    moved = results.paired_difference(
        {seed: loss + added * seed for seed, loss in ours.items()},
        {seed: loss + added * seed for seed, loss in theirs.items()} | {99: 5.0},  # a seed that only one has
    )
    assert num == moved[2] == len(pairs)
    assert (mean, error) == pytest.approx(moved[:2], abs=1e-9)
    assert mean == pytest.approx(sum(difference for _, difference in pairs) / len(pairs), abs=1e-9)


def test_ours_is_measured_against_the_best_of_the_sweep_over_the_same_seeds() -> None:
    found = [result(f"adamw lr={lr} schedule=constant", loss) for lr, loss in ((1, 0.3), (2, 0.2), (3, 0.4))]
    found += [replace(one, seed=1, loss=one.loss + 0.05) for one in found if one.loss]
    found += [result("ours", 0.21), result("ours", 0.27, seed=1), result("ours", 0.0, seed=2)]
    stands = results.standing(results.losses_of(found, "concept", 100), "ours", before=0.5)
    assert stands is not None
    assert stands.best == "adamw lr=2 schedule=constant"
    assert stands.num_seeds == 2
    assert stands.difference == pytest.approx(0.015)
    assert stands.error == pytest.approx(0.005)
    assert stands.share == pytest.approx(0.015 / (0.5 - 0.225))
    assert (stands.rank, stands.num_swept, stands.median) == (2, 3, pytest.approx(0.325))
    assert stands.verdict == "behind"
    assert replace(stands, error=0.02).verdict == "within 1 SE"
    assert replace(stands, difference=-0.001).verdict == "ahead"
    assert replace(stands, loss=0.33).verdict == "behind the median"


def test_a_run_that_came_apart_has_lost_to_all() -> None:
    found = [result("adamw lr=1 schedule=constant", 0.3), replace(result("ours", 0.1), loss=None)]
    stands = results.standing(results.losses_of(found, "concept", 100), "ours", before=0.5)
    assert stands is not None
    assert stands.loss == math.inf
    assert stands.verdict == "behind the median"


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
def test_schedules_end_where_they_should(schedule: str) -> None:
    factors = [bench.schedule_factor(schedule, bench.WARM_UP, 50, step) for step in range(50)]
    if schedule == "linear":
        assert factors[0] == 1.0
        assert factors[25] == 0.5
        assert factors[-1] == pytest.approx(1 / 50)
    elif schedule == "cosine":
        assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert max(factors) == 1.0
        assert factors[5:] == sorted(factors[5:], reverse=True)
        assert factors[-1] < 0.01


# ---- the table ----


def test_what_is_in_the_table_is_not_run_again(tmp_path: Path) -> None:
    file = tmp_path / "table.jsonl"
    jobs = bench.plan(["concept", "style"], ["ours", "adamw lr=0.001 schedule=constant"], [2, 4], [0], judged=False)
    for job in jobs[:3]:
        for steps in job.lengths:
            results.append_result(file, result(job.contestant, 0.1, steps=steps, task=job.task))
    done = {one.key for one in results.read_results(file, "unet")}
    assert bench.left_to_do(jobs, done) == jobs[3:]
    [both] = [job for job in jobs[3:] if job.task == "concept" and len(job.lengths) == 2]
    done.add((both.task, both.contestant, both.lengths[0], both.seed))  # one of its lengths is still missing
    assert both in bench.left_to_do(jobs, done)
    assert results.read_results(file, "another unet") == []


def test_the_tasks_take_turns() -> None:
    jobs = bench.plan(["concept", "style"], ["ours", "sweep"], [100], [0, 1], judged=False)
    assert [job.task for job in jobs[:6]] == ["concept", "style"] * 3
    assert len(jobs) == 2 * 2 * 16
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)


def test_a_run_without_a_horizon_gives_all_lengths_at_once() -> None:
    [job] = bench.plan(["style"], ["adamw lr=0.001 schedule=constant"], [1, 2], [0], judged=False)
    assert job.lengths == (1, 2)
    parts = bench.plan(["style"], ["adamw lr=0.001 schedule=linear"], [1, 2], [0], judged=False)
    assert [part.lengths for part in parts] == [(1,), (2,)]
    at_once = bench.run_job(job)
    alone = bench.run_job(replace(job, lengths=(1,)))
    assert [one.steps for one in at_once] == [1, 2]
    assert at_once[0].curve == alone[0].curve
    assert at_once[0].loss != at_once[1].loss


# ---- what contestants see ----


def test_all_contestants_see_the_same_batches() -> None:
    seen = []
    for contestant in ("ours", "ours optimizer.d_coef=0.5", "prodigy-plus"):
        config = tasks.config_of(tasks.TASKS["style"], 100, 3, bench.settings_of(contestant))
        feed = tasks.Feed("style", config)
        seen.append([feed.at(step) for step in (0, 1, 7)])
        assert generator_of(config.seed, "noise", 7, 0).initial_seed() == generator_of(3, "noise", 7, 0).initial_seed()
    for other in seen[1:]:
        for one, another in zip(seen[0], other, strict=True):
            assert one.captions == another.captions
            assert torch.equal(one.latents, another.latents)
            assert one.text and another.text
            assert torch.equal(one.text["prompt_embeds"], another.text["prompt_embeds"])
    assert seen[0][0].captions != seen[0][1].captions


def test_nothing_that_is_held_out_is_trained() -> None:
    held_out = tasks.held_out_pictures("concept")
    trained = tasks.training_pictures("concept", 0)
    distances = torch.cdist(held_out.latents.flatten(1), trained.latents.flatten(1))
    assert distances.min() > 0.1
    assert set(held_out.parts) == set(trained.parts) == {"new", "known"}


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_a_contestant_trains_and_ships(contestant: str) -> None:
    config = tasks.config_of(tasks.TASKS["style"], 4, 0, bench.settings_of(contestant))
    _, trainable = tasks.trainable_copy(config)
    contender = bench.build(contestant, trainable, config)
    parameters = trainable.named_parameters()
    before = {name: value.detach().clone() for name, value in parameters.items()}
    for value in parameters.values():
        value.grad = torch.ones_like(value)
    contender.optimizer.step()
    trained = {name: value.detach().clone() for name, value in parameters.items()}
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    with contender.shipped():
        pass
    assert all(torch.allclose(value, trained[name], atol=1e-6) for name, value in parameters.items())
    assert math.isnan(contender.d()) == contestant.startswith(("adamw", "schedulefree"))


def test_a_model_that_predicts_noise_is_taught_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "taught"
    monkeypatch.setattr(tasks, "TAUGHT", path)
    monkeypatch.setattr(tasks, "TAUGHT_STEPS", 2)
    monkeypatch.setitem(tasks.TASKS, "base-epsilon", replace(tasks.TASKS["base-epsilon"], num=4, model=str(path)))
    taught, released = tasks.base_model(str(path)), tasks.base_model()
    assert (taught.prediction, released.prediction) == ("epsilon", "v_prediction")
    last = torch.tensor([999])
    signal, _ = taught.schedule.signal_and_noise(last, torch.zeros(1, 1, 1, 1))
    assert float(signal) > 0.05, "without zero terminal SNR"
    moved = dict(taught.networks["unet"].named_parameters())
    assert any(not torch.equal(moved[name], value) for name, value in released.networks["unet"].named_parameters())
    monkeypatch.setattr(tasks, "teach", lambda _: pytest.fail("it is there"))
    tasks.base_model.cache_clear()
    assert tasks.base_model(str(path)).prediction == "epsilon"


def test_folding_a_lora_into_the_weights_changes_nothing() -> None:
    config = tasks.config_of(tasks.TASKS["style"], 4, 0)
    model, trainable = tasks.trainable_copy(config)
    generator = torch.Generator().manual_seed(0)
    for name, value in trainable.named_parameters().items():
        value.data += 0.02 * torch.randn(value.shape, generator=generator) * ("lora_B" in name)
    batch = tasks.Feed("style", config).at(0)
    assert batch.text
    inputs = (batch.latents, torch.tensor([0, 300, 600, 999]), {**batch.text, **batch.sizes})
    gradients, outputs = [], []
    for unet in (model.unet, model.networks["unet"]):  # type: ignore[attr-defined]
        model.unet = unet  # type: ignore[attr-defined]
        outputs.append(model.predict(*inputs))
        outputs[-1].square().mean().backward()
        gradients.append({name: value.grad.clone() for name, value in trainable.named_parameters().items()})  # type: ignore[union-attr]
        for value in trainable.named_parameters().values():
            value.grad = None
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
    assert (outputs[0] - tasks.base_model().predict(*inputs)).abs().max() > 1e-2
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5 + 1e-3 * gradient.abs().max().item()), name


def test_a_drawing_is_made_of_what_there_is(tmp_path: Path) -> None:
    found = [
        result(f"adamw lr={lr} schedule={schedule}", 0.2 + lr, seed)
        for lr in (0.01, 0.1)
        for schedule in bench.SCHEDULES
        for seed in (0, 1)
    ]
    assert plot_defaults.draw_all(found, tmp_path) == []
    paths = plot_defaults.draw_all([*found, result("ours", 0.22), result("ours", 0.24, 1)], tmp_path, settings=2)
    assert [path.name for path in paths] == ["defaults-lr.svg", "defaults-regret.svg", "defaults-d.svg"]
    assert all(path.read_text().startswith("<svg") and "nan" not in path.read_text() for path in paths)


def test_a_table_of_some_seeds_has_only_who_ran_them_all() -> None:
    found = [result("ours", 0.2), result("ours", 0.3, 1), result("adamw lr=1 schedule=constant", 0.1)]
    assert results.with_all_seeds(found, [0, 1]) == found[:2]
    assert results.with_all_seeds(found, [0]) == [found[0], found[2]]
