"""Full fine-tunes whose weights are split over processes (FSDP2): the run that one process makes, in the same files."""

from __future__ import annotations

import json
import signal
import time
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from optim import Piece
from sdtrain.commands.front.plan import plan_config
from sdtrain.config.draft import Written, draft_of
from sdtrain.config.read import resolve
from sdtrain.errors import UserError
from sdtrain.training.ranks import streams
from sdtrain.training.ranks.refused import rank_problems
from sdtrain.training.ranks.shards import whole_one_by_one
from tests.conftest import merged, small_run
from tests.training.rank_team import Job, Team
from tests.training.test_ranks import RAGGED, assert_same_run, codes, log, validations

FULL = {
    **RAGGED,
    "method": {"kind": "full", "train": ["unet"]},
    "optimizer.d0": 1e-5,
    "preview.every": 4,
    "validation.share": 0.3,
    "validation.every": 4,
}
ALONE = {"preview.every": 0, "validation.every": 0, "validation.share": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, Any]:
    return small_run(tmp_path_factory.mktemp("shards"), pictures)


def job(base: dict[str, Any], settings: dict[str, Any], **more: Any) -> Job:
    return Job(merged(base, deepcopy(FULL | settings)), **more)


@pytest.fixture(scope="module")
def alone(team: Team, base: dict[str, Any]) -> Path:
    """The run on one rank."""
    (told,) = team.run(1, job(base, {"name": "alone"}))
    assert told.code == 0, told
    return Path(base["output"]) / "alone"


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return load_file(folder / "parameters.safetensors") | load_file(folder / "optimizer.safetensors")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sharded_run_is_the_one_of_one_process(team: Team, base: dict[str, Any], alone: Path, ranks: int) -> None:
    told = team.run(ranks, job(base, {"name": f"on-{ranks}"}))
    assert codes(told) == [0] * ranks, told
    run = Path(base["output"]) / f"on-{ranks}"
    assert_same_run(run, alone)
    for other in told[1:]:
        assert other.d == told[0].d and other.weights == told[0].weights
        assert other.text == "", "one rank speaks"
    assert "and hold the weights between them" in " ".join(told[0].text.split())
    whole = sum(tensor.numel() for tensor in load_file(_parameters(alone)).values())
    assert [one.held for one in told] == pytest.approx([whole / ranks] * ranks, rel=0.02), "each holds its share"
    assert {name: tensor.shape for name, tensor in state(run, 4).items()} == {
        name: tensor.shape for name, tensor in state(alone, 4).items()
    }
    for one, other in zip(validations(run), validations(alone), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    previews = [sorted(path.name for path in (one / "previews").iterdir()) for one in (run, alone)]
    assert previews[0] == previews[1] != []


@pytest.mark.slow
def test_weights_and_gradients_travel_as_the_plan_says(team: Team, base: dict[str, Any]) -> None:
    """Counted calls of torch.distributed between the beginnings of two steps of one micro-batch."""
    settings = ALONE | {"name": "counted", "checkpoint.every": 0, "data.batch_size": 2, "data.gradient_accumulation": 1}
    told = team.run(2, job(base, settings | {"data.resolution_px": 64, "data.max_aspect": 1.0}))
    assert codes(told) == [0, 0], told
    written = Path(base["output"]) / "counted" / "config.toml"
    plan: Any = plan_config(written, ["device=cpu"], Console(quiet=True), gpus=2)["gpus"]
    expected = plan["travel"]
    for rank in told:
        for name, times, size in (
            ("all_gather_single", "gathers", "gathered_bytes"),
            ("reduce_scatter_single", "reductions", "reduced_bytes"),
        ):
            (calls, num_bytes), (later, more) = rank.travelled[name][1:3]
            assert later - calls == expected[times]
            rows = (more - num_bytes) / expected[size]
            assert 1 <= rows <= 1.02, "rows are dealt out evenly, a few of them empty"
    assert plan["cards"][1]["is_split"] and plan["trained_bytes"] > 0


def test_weights_are_whole_a_few_at_a_time_while_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty of 8 MiB: no more than 64 MiB of them are there together, and the one that is in hand."""
    made: list[weakref.ref[torch.Tensor]] = []

    def put_together(pieces: dict[str, Piece]) -> dict[str, torch.Tensor]:
        found = {name: piece.part.clone() for name, piece in pieces.items()}
        made.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(streams, "put_together", put_together)
    weights = {str(at): torch.full((2**21,), float(at)) for at in range(20)}
    with whole_one_by_one(weights) as stream:
        for name, weight in weights.items():
            assert torch.equal(stream.take(name), weight)
            assert sum(one() is not None for one in made) <= 8
    assert len(made) == 20 and not any(one() is not None for one in made)


def _parameters(run: Path) -> Path:
    return run / "checkpoints" / "step-000004" / "parameters.safetensors"


@pytest.mark.slow
def test_shares_that_lie_on_the_host_train_the_same_run(team: Team, base: dict[str, Any], alone: Path) -> None:
    assert codes(team.run(2, job(base, {"name": "offloaded", "parallel.offload": True}))) == [0, 0]
    assert_same_run(Path(base["output"]) / "offloaded", alone)


@pytest.mark.slow
@pytest.mark.parametrize("lever", ["memory.compile", "memory.gradient_checkpointing"])
def test_what_saves_time_or_memory_trains_the_same_sharded_run(team: Team, base: dict[str, Any], lever: str) -> None:
    name = lever.rpartition(".")[2]
    for ranks, changes in ((1, {}), (2, {lever: True})):
        told = team.run(ranks, job(base, ALONE | {"name": f"{name}-{ranks}"} | changes))
        assert codes(told) == [0] * ranks, told
    assert_same_run(Path(base["output"]) / f"{name}-2", Path(base["output"]) / f"{name}-1")


@pytest.mark.slow
def test_a_sharded_text_encoder_is_the_one_of_one_process(team: Team, base: dict[str, Any]) -> None:
    settings = ALONE | {"method": {"kind": "full", "train": ["unet", "text_encoder"]}}
    for ranks in (1, 2):
        assert codes(team.run(ranks, job(base, settings | {"name": f"text-{ranks}"}))) == [0] * ranks
    assert_same_run(Path(base["output"]) / "text-2", Path(base["output"]) / "text-1")


@pytest.mark.slow
def test_a_run_goes_on_sharded_or_whole_on_any_number_of_ranks(team: Team, base: dict[str, Any], alone: Path) -> None:
    for steps, ranks, kind in ((1, 2, "auto"), (2, 1, "auto"), (3, 3, "fsdp"), (4, 2, "ddp")):
        told = team.run(ranks, job(base, {"name": "changing", "steps": steps, "parallel.kind": kind}, resume=steps > 1))
        assert codes(told) == [0] * ranks, told
    assert_same_run(Path(base["output"]) / "changing", alone)


@pytest.mark.slow
def test_a_sharded_run_goes_on_bit_for_bit_on_as_many_ranks(team: Team, base: dict[str, Any]) -> None:
    assert codes(team.run(2, job(base, {"name": "straight"}))) == [0, 0]
    assert codes(team.run(2, job(base, {"name": "two", "steps": 2}))) == [0, 0]
    assert codes(team.run(2, job(base, {"name": "two"}, resume=True))) == [0, 0]
    straight, two = (state(Path(base["output"]) / name, 4) for name in ("straight", "two"))
    assert straight.keys() == two.keys()
    assert all(torch.equal(straight[name], two[name]) for name in straight)


@pytest.mark.slow
def test_what_only_looks_does_not_change_a_sharded_training(team: Team, base: dict[str, Any]) -> None:
    assert codes(team.run(2, job(base, ALONE | {"name": "unseen"}))) == [0, 0]
    assert codes(team.run(2, job(base, ALONE | {"name": "seen", "preview.every": 1}))) == [0, 0]
    unseen, seen = (state(Path(base["output"]) / name, 4) for name in ("unseen", "seen"))
    assert all(torch.equal(unseen[name], seen[name]) for name in unseen)


@pytest.mark.slow
def test_whoever_is_asked_to_stop_all_save_what_they_reached(team: Team, base: dict[str, Any], alone: Path) -> None:
    told = team.run(2, job(base, {"name": "stopped"}, events={"stop": (1, 1)}))
    assert codes(told) == [143, 143], told
    run = Path(base["output"]) / "stopped"
    assert "--resume" in told[0].text and told[1].text == ""
    assert (run / "weights" / "stopped-step-000001.safetensors").exists()
    assert codes(team.run(2, job(base, {"name": "stopped"}, resume=True))) == [0, 0]
    assert_same_run(run, alone)


@pytest.mark.slow
def test_a_rank_without_pictures_computes_with_the_others(team: Team, base: dict[str, Any]) -> None:
    """Three pictures of three sizes and three processes, or of one size and two micro-batches."""
    settings = ALONE | {"data.batch_size": 3, "data.gradient_accumulation": 1, "steps": 3}
    assert codes(team.run(1, job(base, settings | {"name": "few-1"}))) == [0]
    told = team.run(3, job(base, settings | {"name": "few-3"}))
    assert codes(told) == [0, 0, 0], told
    assert_same_run(Path(base["output"]) / "few-3", Path(base["output"]) / "few-1")


@pytest.mark.slow
def test_steps_that_are_not_finite_end_all_ranks_with_what_was_reached(team: Team, base: dict[str, Any]) -> None:
    told = team.run(2, job(base, ALONE | {"name": "broken", "steps": 20}, events={"nan": (1, 2)}))
    assert codes(told) == [4, 4], told
    assert "not finite 5 times in a row" in told[0].text
    assert "--resume" in told[0].text


@pytest.mark.slow
@pytest.mark.parametrize("behind", [True, False])
def test_a_disk_that_is_full_for_a_state_is_told_and_tried_again(
    team: Team, base: dict[str, Any], behind: bool
) -> None:
    name = f"full-{behind}"
    settings = ALONE | {"name": name, "checkpoint.every": 1, "checkpoint.in_background": behind}
    told = team.run(2, job(base, settings, events={"full disk": (0, 2)}))
    assert codes(told) == [0, 0], told
    assert "step 2 could not be saved" in " ".join(told[0].text.split())
    assert [line["step"] for line in log(Path(base["output"]) / name)] == [1, 2, 3, 4]
    assert json.loads((_parameters(Path(base["output"]) / name).parent / "state.json").read_text())["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("taken", [0, 100])
def test_a_disk_that_is_full_for_the_weights_ends_all_ranks_with_a_state(
    team: Team, base: dict[str, Any], alone: Path, taken: int
) -> None:
    """However many of the weights were written before: nobody waits for the others' parts."""
    settings = {"name": f"no-weights-{taken}"}
    told = team.run(2, job(base, settings, events={"full disk for weights": (0, taken)}))
    assert codes(told) == [2, 2], told
    assert "could not be written: No space left on device" in " ".join(told[0].text.split())
    assert "could not be written" not in told[1].text
    assert codes(team.run(2, job(base, settings, resume=True))) == [0, 0]
    assert_same_run(Path(base["output"]) / settings["name"], alone)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"method": {"kind": "lora"}, "parallel.kind": "fsdp"}, "parallel.kind", "adapters, which are small enough"),
        ({"parallel.kind": "fsdp", "memory.fused_back_pass": True}, "parallel.kind", "fused_back_pass moves weights"),
        ({"parallel.kind": "fsdp", "method.stop": {"unet": 3}}, "parallel.kind", "method.stop would leave"),
        ({"parallel.kind": "ddp", "parallel.replicas": 2}, "parallel.replicas", "only fsdp has any"),
        ({"parallel.kind": "ddp", "parallel.offload": True}, "parallel.offload", "only fsdp has shares"),
        ({"method": {"kind": "lora"}, "parallel.offload": True}, "parallel.offload", "this run is not split"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    base: dict[str, Any], changes: dict[str, Any], where: str, what: str
) -> None:
    with pytest.raises(UserError) as error:
        resolve(job(base, {"name": "refused", "steps": 400} | changes).table, "test config")
    assert where in str(error.value) and what in " ".join(str(error.value).split())


def test_ranks_that_make_no_even_groups_are_refused(base: dict[str, Any]) -> None:
    table = job(base, {"name": "refused", "parallel.replicas": 3}).table
    written = Written("test config", table, table)
    (problem,) = rank_problems(draft_of(written), 2)
    assert problem.where == "parallel.replicas" and "2 ranks cannot be dealt out to so many groups" in problem.what


@pytest.mark.slow
def test_groups_that_hold_the_weights_between_them_train_the_same_run(base: dict[str, Any], alone: Path) -> None:
    """Two groups of two processes (HSDP)."""
    team = Team(4)
    try:
        settings = {"name": "groups", "data.gradient_accumulation": 4, "data.batch_size": 2}
        one = team.run(1, job(base, ALONE | settings | {"name": "no-groups"}))
        told = team.run(4, job(base, ALONE | settings | {"parallel.replicas": 2}))
    finally:
        team.end()
    assert codes(one) == [0] and codes(told) == [0] * 4, told
    assert_same_run(Path(base["output"]) / "groups", Path(base["output"]) / "no-groups")


def assert_goes_on(base: dict[str, Any], name: str, alone: Path) -> None:
    """A new pair of processes ends the run as the one of one process ended."""
    with Team(2) as team:
        assert codes(team.run(2, job(base, {"name": name}, resume=True))) == [0, 0]
    assert_same_run(Path(base["output"]) / name, alone)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_newest_state_goes_on(base: dict[str, Any], alone: Path) -> None:
    """Nobody has the whole weights any more: what was not saved before is lost, which is said."""
    with Team(2) as team:
        told = team.run(2, job(base, {"name": "killed"}, events={"kill": (1, 2)}))
        assert told[0].code == 1, told[0]
        assert "another rank" in told[0].text or "another process" in told[0].text, told[0].text
        assert "not all of them could put them together any more" in " ".join(told[0].text.split())
    assert_goes_on(base, "killed", alone)


@pytest.mark.slow
def test_a_rank_that_is_silent_ends_the_others_of_a_split_run(base: dict[str, Any], alone: Path) -> None:
    """They wait for its share of a layer in a call that cannot be left, so that only their end ends it."""
    with Team(2) as team:
        team.run(2, job(base, {"name": "spoken", "steps": 1}))
        began = time.monotonic()
        (told, *_) = team.run(2, job(base, {"name": "silent"}, events={"freeze in a step": (1, 1)}), of=1)
        assert time.monotonic() - began < 60
        assert told.code == -signal.SIGKILL, "nothing was answered, for the process ended"
    said = (Path(base["output"]) / "said-by-0.txt").read_text()
    assert "rank 1 has not been heard of for 5 s" in said and "start the run again with --resume" in said
    assert_goes_on(base, "silent", alone)
