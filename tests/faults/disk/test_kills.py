"""SIGKILL at any moment: what has its name is whole, and the run goes on to the bits of one that was not killed."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import merged, small_run
from tests.faults.disk.kills import BROKEN, Kill, Outcome, Sat, killed_and_gone_on, one_round, sit, sort_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="processes are forked, on Linux")

SMALL: dict[str, Any] = {
    "device": "cpu",
    "data.resolution_px": 64,
    "data.bucket_step_px": 64,
    "data.max_aspect": 1.0,
    "data.batch_size": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 2,
}
WATCHED: dict[str, Any] = {
    "steps": 5,
    "preview.every": 2,
    "preview.num_inference_steps": 1,
    "validation.share": 0.34,
    "validation.every": 2,
    "validation.noise_levels": 1,
}
"""A run that writes everything that there is to write."""
SEED = 20251126


@dataclass(frozen=True)
class Place:
    """Where a run and its copies take place. table: its settings; straight: what was seen of it undisturbed."""

    table: dict[str, Any]
    folder: Path
    straight: Sat

    def disturbed(self, name: str, plan: list[Kill], broken: str = "") -> Outcome:
        """Return what becomes of a copy of the run that is killed as planned and then goes on."""
        output = self.folder / name / "runs"
        table = merged(self.table, {"output": str(output)})
        straight = self.folder / "straight" / "runs" / "small"
        return killed_and_gone_on(table, output / "small", straight, plan, broken)


@pytest.fixture(scope="module")
def place(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place_of(pictures, tmp_path_factory.mktemp("kills"), {"steps": 4})


@pytest.fixture(scope="module")
def watched(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place_of(pictures, tmp_path_factory.mktemp("watched"), WATCHED)


def place_of(pictures: Path, folder: Path, changes: dict[str, Any]) -> Place:
    table = merged(small_run(folder, pictures), SMALL | changes | {"output": str(folder / "straight" / "runs")})
    sit(merged(table, {"output": str(folder / "before" / "runs")}))  # fills the cache
    straight = sit(table)
    assert (straight.exit_code, straight.error) == (0, "")
    assert len(straight.seconds) == table["steps"] and len(straight.calls) > 100
    return Place(table, folder, straight)


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(place: Place) -> None:
    """Kills in the most delicate places; the whole round is the slow test below."""
    plans = {
        "one": [
            Kill("write a state's optimizer.safetensors", 3, "halfway"),
            Kill("flush the names in checkpoints", 1),  # between a rename and its flush
            Kill(step=1, after_s=0.01),
        ],
        "two": [
            Kill("give its name to a state's folder", 1),
            Kill("write log.jsonl", 2, "halfway"),
            Kill("remove a file of an old state", 3),
        ],
    }
    for name, plan in plans.items():
        outcome = place.disturbed(name, plan)
        assert outcome.problems == ()
        assert list(outcome.landed) == plan


def test_a_kill_just_after_the_last_save_leaves_no_state_too_many(place: Place) -> None:
    """There is no save any more that would remove the ones that may go."""
    kill = Kill("rename an old state before its removal", place.table["steps"] - SMALL["checkpoint.keep"])
    outcome = place.disturbed("three", [kill])
    assert outcome.problems == () and outcome.landed == (kill,)


@pytest.mark.slow
def test_more_than_a_hundred_kills_at_every_sort_of_moment_are_survived(watched: Place) -> None:
    began, problems, landed = time.monotonic(), list[str](), list[Kill]()
    rng = random.Random(SEED)
    again = chain.from_iterable(one_round(watched.straight, rng) for _ in count())
    first = list(one_round(watched.straight, random.Random(SEED)))
    for number, kill in enumerate(first):
        outcome = watched.disturbed(f"copy-{number}", [kill, *islice(again, number % 3)])  # up to three in a row
        problems += [f"{number}: {what}" for what in outcome.problems]
        landed += outcome.landed
    places = Counter(map(str, landed))
    print(f"{len(landed)} kills of {len(first)} runs in {time.monotonic() - began:.0f} s, {len(problems)} problems")
    print(*(f"{times:4d}  {name}" for name, times in sorted(places.items())), sep="\n")
    assert problems == []
    assert len(landed) >= 100
    assert {kill.sort for kill in landed} >= {sort_of(call) for call in watched.straight.calls}


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_a_copy_that_is_broken_on_purpose_does_not_survive(place: Place, broken: str) -> None:
    """Else the tests above would prove nothing."""
    name = "-".join(broken.split())
    for number, kill in enumerate(one_round(place.straight, random.Random(SEED)), 1):
        outcome = place.disturbed(f"{name}-{number}", [kill], broken)
        if outcome.problems:
            print(f"{broken}: found by kill {number}: {outcome.problems}")
            return
    pytest.fail("no kill showed it")
