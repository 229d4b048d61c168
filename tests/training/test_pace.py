"""How fast a run is said to be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sdtrain.training.watching import pace
from sdtrain.training.watching.pace import MEMORY, Pace

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_fit


def said(monkeypatch: pytest.MonkeyPatch, seconds: list[float], num_images: int) -> list[float]:
    """What is said after steps of so many seconds, with a minute between them."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    clock, told = Pace(), []
    for one in seconds:
        now[0] += 60
        clock.begin_step()
        now[0] += one
        told.append(clock.end_step(num_images))
    return told


def test_what_happens_between_steps_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, [0.5, 0.5, 0.5], 4) == pytest.approx([8.0, 8.0, 8.0])


def test_a_slow_first_step_counts_as_one_step_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [30.0, *[0.5] * 39]
    weights = [MEMORY**age for age in reversed(range(40))]
    mean = sum(w * s for w, s in zip(weights, seconds, strict=True)) / sum(weights)
    found = said(monkeypatch, seconds, 4)
    assert found[-1] == pytest.approx(4 / mean)
    assert found[1] == pytest.approx(4 / ((MEMORY * 30 + 0.5) / (MEMORY + 1)))


def test_it_follows_a_run_that_becomes_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, [0.5] * 50 + [1.0] * 50, 4)[-1] == pytest.approx(4.0, rel=0.01)


def test_the_benchmark_finds_the_steps_behind_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [3.0, 0.7, 0.5, 0.52, 0.9, 0.51]
    means = [8 / rate for rate in said(monkeypatch, seconds, 8)]
    assert bench_fit.step_seconds(means) == pytest.approx(seconds)
