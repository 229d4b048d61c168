"""Several processes train the run that one process trains: the same pictures, the same steps, one set of files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import sdtrain
from sdtrain.config.write import config_to_toml
from sdtrain.data.order import deal
from sdtrain.errors import UserError
from sdtrain.training.ranks import group
from sdtrain.training.ranks.group import Ranks
from sdtrain.training.ranks.place import Place, place_of
from tests.conftest import merged
from tests.training.rank_team import SLOW_S, Job, Team, Told, free_port

RAGGED = {
    "data.batch_size": 2,
    "data.gradient_accumulation": 3,
    "checkpoint.every": 1,
    "steps": 4,
    "optimizer.eps": 1e-4,
}
"""Six pictures a step, in buckets of one to four, so that a step has micro-batches of one and of two pictures. With the
atan2 update a gradient that is all but 0 would tip with the rounding of sums."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def job(table: dict[str, Any], settings: dict[str, Any], **more: Any) -> Job:
    return Job(merged(table, RAGGED | settings), **more)


def log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "groups" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / f"{run.name}.safetensors")


def codes(told: list[Told]) -> list[int]:
    return [one.code for one in told]


def assert_same_run(some: Path, other: Path) -> None:
    """Equal but for where sums are rounded."""
    assert [line["step"] for line in log(some)] == [line["step"] for line in log(other)]
    losses = [[line["loss"] for line in log(run)] for run in (some, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    mine, theirs = weights(some), weights(other)
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in mine)
    size = sum(float(tensor.square().sum()) for name, tensor in theirs.items() if "up" in name)
    assert apart < 1e-8 * size, (apart / size) ** 0.5


def assert_goes_on_alone(base: dict[str, Any], name: str, alone: Path) -> None:
    """One rank goes on with a run that several began, and it becomes the run that one alone made."""
    team = Team(1)
    try:
        assert codes(team.run(1, job(base, {"name": name}, resume=True))) == [0]
    finally:
        team.end()
    assert_same_run(Path(base["output"]) / name, alone)


@pytest.fixture(scope="module")
def base(folder: Path, pictures: Path) -> dict[str, Any]:
    from tests.conftest import small_run

    return small_run(folder, pictures)


@pytest.fixture(scope="module")
def alone(team: Team, base: dict[str, Any]) -> Path:
    """The run on one rank."""
    assert codes(team.run(1, job(base, {"name": "alone"}))) == [0]
    return Path(base["output"]) / "alone"


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_run_is_the_same_on_any_number_of_ranks(team: Team, base: dict[str, Any], alone: Path, ranks: int) -> None:
    told = team.run(ranks, job(base, {"name": f"on-{ranks}"}))
    assert codes(told) == [0] * ranks, told
    assert_same_run(Path(base["output"]) / f"on-{ranks}", alone)
    for other in told[1:]:
        assert other.d == told[0].d and other.weights == told[0].weights, "all ranks hold the same numbers to the bit"
        assert other.text == "", "one rank speaks"
    (one,) = team.run(1, job(base, {"name": f"pictures-{ranks}"}))
    for step in range(4):
        shares = [rank.pictures[step] for rank in told]
        assert sorted(name for share in shares for name in share) == sorted(one.pictures[step]), (
            "every picture of the step once"
        )
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("targets", [pytest.param("attention", marks=pytest.mark.slow), "all"])
def test_ranks_exchange_what_the_plan_says(team: Team, base: dict[str, Any], targets: str) -> None:
    """Counted calls of torch.distributed between the beginnings of two steps, in which all layers have gradients."""
    from sdtrain.commands.front.plan import plan_config

    settings = {"name": f"counted-{targets}", "checkpoint.every": 0, "method.targets": targets, "method.rank": 40}
    told = team.run(2, work := job(base, settings))
    assert codes(told) == [0, 0], told
    written = Path(base["output"]) / f"counted-{targets}" / "config.toml"
    found: Any = plan_config(written, [], Console(quiet=True), gpus=2)["gpus"]
    expected = found["exchanged"]["calls"], found["exchanged"]["num_bytes"]
    for rank in told:
        (calls, num_bytes), *_, (later, more) = rank.added_up[1:]
        steps = len(rank.added_up) - 2
        assert (later - calls, more - num_bytes) == (steps * expected[0], steps * expected[1])
    assert work.table["steps"] == 4 and expected[1] > 4 * 2**16


def test_ranks_fill_the_cache_together_each_entry_once(team: Team, base: dict[str, Any], tmp_path: Path) -> None:
    entries = {}
    for ranks in (1, 3):
        cache = tmp_path / f"cache-{ranks}"
        told = team.run(ranks, job(base, {"name": f"cached-{ranks}", "steps": 1, "data.cache": str(cache)}))
        assert codes(told) == [0] * ranks, told
        entries[ranks] = {path.name: path.read_bytes() for path in cache.rglob("*.safetensors")}
        assert sorted(name for one in told for name in one.encoded) == sorted(entries[ranks])
    assert entries[1] == entries[3] != {}
    shares = [len(one.encoded) for one in told]
    assert max(shares) - min(shares) <= 3, "pictures and captions are dealt out one by one"


def test_a_picture_that_cannot_be_read_is_told_by_the_first_rank_whoever_met_it(
    team: Team, base: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(base["data"]["folder"][0]["path"], folder)
    for number in (0, 1):
        whole = (folder / f"{number}.png").read_bytes()
        (folder / f"{number}.png").write_bytes(whole[: len(whole) // 2])
    changes = {"name": "broken", "data.folder": [{"path": str(folder)}], "data.cache": str(tmp_path / "cache")}
    told = team.run(2, job(base, changes))
    assert codes(told) == [2, 2] and told[1].text == ""
    assert "0.png" in told[0].text and "1.png" in told[0].text


def validations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{"step": line["step"], **line["validation"]} for line in lines if "validation" in line]


HELD_OUT = {"validation.share": 0.5, "validation.every": 2, "data.batch_size": 1, "data.gradient_accumulation": 2}


def test_ranks_share_the_validation_and_know_what_one_would(team: Team, base: dict[str, Any]) -> None:
    found = {}
    for ranks in (1, 2):
        told = team.run(ranks, job(base, HELD_OUT | {"name": f"validated-{ranks}"}))
        assert codes(told) == [0] * ranks, told
        found[ranks] = validations(Path(base["output"]) / f"validated-{ranks}")
        for pictures in zip(*(one.validated for one in told), strict=True):
            names = [name for share in pictures for name in share]
            assert len(set(names)) == len(names) == 3 and all(pictures), "each picture once, and a share for everybody"
    assert len(found[1]) == len(found[2]) >= 2
    for one, other in zip(found[1], found[2], strict=True):
        assert one.keys() == other.keys()
        numbers = [[value for value in line.values() if isinstance(value, float)] for line in (one, other)]
        assert len(numbers[0]) >= 2 and numbers[0] == pytest.approx(numbers[1], rel=1e-5)


PREVIEWS = {"preview.every": 2, "preview.prompts": [f"a circle {number}" for number in range(7)]}


def test_ranks_share_the_previews_and_draw_what_one_would(team: Team, base: dict[str, Any]) -> None:
    drawn = {}
    for ranks in (1, 2):
        name = f"drawn-{ranks}"
        told = team.run(ranks, job(base, PREVIEWS | {"name": name, "steps": 2}))
        assert codes(told) == [0] * ranks, told
        assert [one.drawn for one in told] == ([[7] * 2] if ranks == 1 else [[4] * 2, [3] * 2]), "each picture once"
        folder = Path(base["output"]) / name / "previews"
        drawn[ranks] = [np.asarray(Image.open(path)) for path in sorted(folder.glob("step-*.png"))]
    assert len(drawn[1]) == 2 and np.array_equal(drawn[1][0][40:], drawn[2][0][40:]), (
        "before the first step: bit for bit"
    )
    apart = np.abs(drawn[1][1][40:].astype(int) - drawn[2][1][40:].astype(int))
    assert apart.max() <= 2, "after it, as far as sums are rounded"


def test_a_preview_that_fails_on_any_rank_is_a_note_and_the_run_goes_on(team: Team, base: dict[str, Any]) -> None:
    told = team.run(2, job(base, PREVIEWS | {"name": "not-drawn", "steps": 2}, events={"fail to draw": (1, 0)}))
    assert codes(told) == [0, 0], told
    assert "no preview of step 0: it failed on another process; the training goes on" in " ".join(told[0].text.split())
    folder = Path(base["output"]) / "not-drawn" / "previews"
    assert [path.name for path in sorted(folder.glob("step-*.png"))] == ["step-000002.png"]


def test_a_validation_that_fails_on_any_rank_is_a_note_and_the_run_goes_on(team: Team, base: dict[str, Any]) -> None:
    told = team.run(2, job(base, HELD_OUT | {"name": "failed"}, events={"fail to validate": (1, 3)}))
    assert codes(told) == [0, 0], told
    assert "the validation of step 2 failed: on another process; the training goes on" in " ".join(told[0].text.split())
    assert [line["step"] for line in validations(Path(base["output"]) / "failed")] == [0, 4]


LEVERS: dict[str, dict[str, Any]] = {
    "int8": {"model.base_precision": "int8"},
    "nf4": {"model.base_precision": "nf4"},
    "recomputed": {"memory.gradient_checkpointing": True},
    "compiled": {"memory.compile": True},
    "dora": {"method.adapter": "dora"},
    "lokr": {"method.adapter": "lokr"},
    "oft": {"method.adapter": "oft", "method.rank": 4, "export.names": "diffusers"},
    "text encoders": {"method.train": ["unet", "text_encoder", "text_encoder_2"]},
    "norm limit": {"method.scale_weight_norms": 0.01},
    "preserved": {"preserve.weight": 0.5},
    "dropout": {"method.dropout": 0.3, "method.rank_dropout": 0.2, "method.module_dropout": 0.2},
}


@pytest.mark.slow
@pytest.mark.parametrize("lever", LEVERS)
def test_every_lever_that_works_alone_works_on_ranks(team: Team, base: dict[str, Any], lever: str) -> None:
    runs = []
    for ranks in (1, 2):
        name = f"{lever.replace(' ', '-')}-{ranks}"
        told = team.run(ranks, job(base, LEVERS[lever] | {"name": name}))
        assert codes(told) == [0] * ranks, told
        assert all(other.d == told[0].d and other.weights == told[0].weights for other in told)
        runs.append(Path(base["output"]) / name)
    losses = [[line["loss"] for line in log(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_ranks_that_compute_in_float16_have_one_scale(team: Team, base: dict[str, Any]) -> None:
    seen = {}
    for ranks in (1, 2):
        told = team.run(ranks, job(base, {"name": f"half-{ranks}", "model.dtype": "float16"}))
        assert codes(told) == [0] * ranks, told
        assert all(other.d == told[0].d and other.weights == told[0].weights for other in told)
        run = Path(base["output"]) / f"half-{ranks}"
        state = json.loads((run / "checkpoints" / "step-000004" / "state.json").read_text())
        assert state["loss_scale"] == [2.0**16, 4]
        seen[ranks] = [line["loss"] for line in log(run)]
    assert seen[2] == pytest.approx(seen[1], rel=1e-2)


def test_a_run_goes_on_with_another_number_of_ranks(team: Team, base: dict[str, Any], alone: Path) -> None:
    for steps, ranks in ((1, 2), (2, 1), (3, 3), (4, 2)):
        told = team.run(ranks, job(base, {"name": "changing", "steps": steps}, resume=steps > 1))
        assert codes(told) == [0] * ranks, told
    assert_same_run(Path(base["output"]) / "changing", alone)


def test_whoever_is_asked_to_stop_all_end_after_the_same_step_and_the_run_goes_on(
    team: Team, base: dict[str, Any], alone: Path
) -> None:
    told = team.run(2, job(base, {"name": "stopped"}, events={"stop": (1, 1)}))
    assert codes(told) == [143, 143], told
    assert len(told[0].d) == len(told[1].d) == 2, "the guard's look before the first step, and one step"
    assert "--resume" in told[0].text and told[1].text == ""
    assert codes(team.run(2, job(base, {"name": "stopped"}, resume=True))) == [0, 0]
    assert_same_run(Path(base["output"]) / "stopped", alone)


def test_where_one_rank_lacks_memory_all_give_up_the_same(team: Team, base: dict[str, Any], alone: Path) -> None:
    settings = {"name": "short", "memory.on_oom": "adapt", "memory.gradient_checkpointing": True}
    told = team.run(2, job(base, settings, events={"no memory": (1, 1)}))
    assert codes(told) == [0, 0], told
    text = " ".join(told[0].text.split())
    assert text.count("out of memory on another process; from here on") == 1 and told[1].text == "", text
    assert told[0].d == told[1].d and told[0].weights == told[1].weights
    assert_same_run(Path(base["output"]) / "short", alone)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"data.gradient_accumulation": 1, "data.batch_size": 1}, "data.batch_size", "fewer than the 2 ranks"),
        ({"data.batch_size": 3, "data.gradient_accumulation": 1}, "data.batch_size", "2 ranks cannot share equally"),
        (
            {"method": {"kind": "full"}, "memory.on_oom": "adapt"},
            "memory.on_oom",
            "leaves the other ranks within a layer",
        ),
        (
            {"method": {"kind": "full"}, "memory.fused_back_pass": True, "data.gradient_accumulation": 1},
            "memory.fused_back_pass",
            "before the gradients of the other ranks are there",
        ),
    ],
)
def test_what_ranks_cannot_train_is_told_by_one_of_them_before_anything_is_written(
    team: Team, base: dict[str, Any], changes: dict[str, Any], where: str, what: str
) -> None:
    told = team.run(2, job(base, {"name": "refused"} | changes))
    assert codes(told) == [2, 2]
    assert where in told[0].text and what in told[0].text, told[0].text
    assert told[1].text == ""
    assert not (Path(base["output"]) / "refused").exists()


def test_a_rank_that_was_started_otherwise_is_named(team: Team, base: dict[str, Any]) -> None:
    told = team.run(2, job(base, {"name": "unlike"}, changes={1: {"seed": 7}}))
    assert codes(told) == [2, 2]
    assert "rank 1  has another config than rank 0" in told[0].text and told[1].text == ""
    assert not (Path(base["output"]) / "unlike" / "log.jsonl").exists()


def test_losses_that_stay_not_finite_end_all_ranks_alike(team: Team, base: dict[str, Any]) -> None:
    told = team.run(2, job(base, {"name": "nan", "steps": 8, "optimizer.d0": 1e30, "optimizer.d_limiter": False}))
    assert codes(told) == [4, 4], told
    assert "not finite 5 times in a row" in told[0].text and told[1].text == ""


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_with_a_sentence_and_a_whole_state(
    base: dict[str, Any], alone: Path
) -> None:
    team = Team(2)
    try:
        told = team.run(2, job(base, {"name": "killed", "checkpoint.every": 0}, events={"kill": (1, 2)}))
        assert codes(told) == [1, -9], told
        assert "another rank  ended or cannot be reached any more" in told[0].text
        assert "--resume" in told[0].text
    finally:
        team.end()
    # what was kept is the last step that all ranks had done
    assert_goes_on_alone(base, "killed", alone)


@pytest.mark.slow
def test_a_rank_that_is_silent_is_lost_within_a_bounded_time(base: dict[str, Any], alone: Path) -> None:
    """It is frozen, as by a machine that hangs: its connections stay, and nothing comes from it any more."""
    team = Team(2)
    team.run(2, job(base, {"name": "before", "steps": 1}))
    began = time.monotonic()
    try:
        (told, *_) = team.run(2, job(base, {"name": "frozen", "checkpoint.every": 0}, events={"freeze": (1, 2)}), of=1)
        assert time.monotonic() - began < 40
        assert told.code == 1 and "rank 1 has not been heard of for 5 s" in told.text, told
        assert "--resume" in told.text
    finally:
        team.end()
    assert_goes_on_alone(base, "frozen", alone)


class Work:
    """A collective that is not done in time, and is once somebody has looked."""

    def __init__(self, *, fails: bool, completes: bool) -> None:
        self._fails, self._completes = fails, completes

    def is_completed(self) -> bool:
        return self._completes

    def wait(self, timeout: object = None) -> None:
        if timeout is not None:
            raise RuntimeError("Operation timed out!")
        if self._fails:
            raise RuntimeError("Connection closed by peer")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_slow_writer_makes_nobody_give_up(team: Team, base: dict[str, Any], kind: str) -> None:
    """Ranks wait for longer than one of them may be silent; in the full fine-tune within the collectives of a state."""
    settings = {"name": f"slow-{kind}", "checkpoint.every": 2, "checkpoint.in_background": False}
    if kind == "full":
        settings |= {"method": {"kind": "full"}, "optimizer.d0": 1e-5}
    began = time.monotonic()
    told = team.run(2, job(base, settings, events={"slow disk": (0, 2)}))
    assert codes(told) == [0, 0], told
    assert time.monotonic() - began > SLOW_S
    assert len(log(Path(base["output"]) / settings["name"])) == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_are_alone_say_so_after_a_while(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Nobody answers at the address, or nobody comes to it."""
    monkeypatch.setattr(group, "MEETING", timedelta(seconds=2))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name, number in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(number))
    began = time.monotonic()
    with pytest.raises(UserError, match="cannot reach the others"), group.joined(place_of(os.environ)):
        raise AssertionError("nothing may be started")
    assert time.monotonic() - began < 30
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("cards", "what"), [(1, "needs a card of its own"), (2, "built without NCCL")])
def test_what_cards_lack_is_said_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, cards: int, what: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match=what), group.joined(Place(1, 2, 1)):
        raise AssertionError("nothing may be started")
    assert not torch.distributed.is_initialized()


def test_a_collective_that_is_done_just_after_the_look_has_not_failed() -> None:
    assert not Ranks._is_done(Work(fails=False, completes=False))
    assert Ranks._is_done(Work(fails=False, completes=True))
    with pytest.raises(RuntimeError, match="closed by peer"):
        Ranks._is_done(Work(fails=True, completes=True))


@pytest.mark.slow
def test_one_command_starts_several_processes_and_ends_as_the_first_of_them(
    base: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    config = sdtrain.Config.model_validate(merged(base, RAGGED | {"name": "launched", "device": "cpu"}))
    (tmp_path / "c.toml").write_text(config_to_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "sdtrain", "fit", str(tmp_path / "c.toml"), "--gpus", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2, which share the pictures of a step" in done.stdout and done.stdout.count("done: 4 steps") == 1
    assert done.stderr == ""
    assert_same_run(Path(base["output"]) / "launched", alone)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and again.stderr.count("holds a finished run") == 1
    if not torch.cuda.is_available():
        none = subprocess.run([*command, "--set", "device=cuda"], capture_output=True, text=True, timeout=120)
        assert none.returncode == 2 and "--gpus  2, but torch finds no cards on this machine" in none.stderr


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_lost_a_rank(base: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    table = merged(base, RAGGED | {"name": "elastic", "device": "cpu", "checkpoint.every": 1})
    (tmp_path / "c.toml").write_text(config_to_toml(sdtrain.Config.model_validate(table)), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *launcher, "-m", "sdtrain", "fit", str(tmp_path / "c.toml"), "--resume-or-start"]
    run = Path(base["output"]) / "elastic"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not (run / "checkpoints" / "step-000001" / "state.json").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "of which" in " ".join(said.split()) and said.count("done: 4 steps") == 1, said
    assert_same_run(run, alone)


@pytest.mark.parametrize(
    ("environment", "where", "what"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE", "not a whole number"),
        ({"WORLD_SIZE": "4"}, "RANK", "is not set, though WORLD_SIZE is 4"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK", "ranks count from 0"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environment: dict[str, str], where: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        place_of(environment)
    assert where in str(caught.value) and what in str(caught.value)


def test_without_a_launcher_a_run_is_alone() -> None:
    assert place_of({}) == Place() and Place().is_first
    assert place_of({"WORLD_SIZE": "1"}) == Place()


def test_dealing_leaves_out_nothing_and_balances() -> None:
    costs = [9, 1, 1, 1, 5, 3]
    dealt = deal(costs, 2)
    assert sorted(index for hand in dealt for index in hand) == list(range(6))
    assert sorted(sum(costs[index] for index in hand) for hand in dealt) == [10, 10]
    assert deal([4], 3) == [[0], [], []]
    assert deal([2, 2, 2], 1) == [[0, 1, 2]]
