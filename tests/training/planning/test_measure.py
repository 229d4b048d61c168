"""A few steps are made to say how long one takes; nothing of them stays but the encoded pictures."""

from __future__ import annotations

import io
import signal
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from sdtrain.commands.front.plan import plan_config
from sdtrain.config.read import read_draft, resolve
from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.errors import Interrupted
from sdtrain.training.ending.signals import StopRequests
from sdtrain.training.planning import measure
from sdtrain.training.planning.measure import COUNTED, WARMING_UP, Measured, measure_steps
from sdtrain.training.start import inspect_run
from tests.conftest import merged, small_run


@pytest.fixture
def config(tmp_path: Path, pictures: Path) -> Config:
    table = merged(small_run(tmp_path, pictures), {"device": "cpu", "steps": 3, "preview.every": 1})
    return resolve(table, "test config")


def test_the_command_measures_the_steps_of_the_run_and_leaves_nothing_but_the_cache(
    config: Config, tmp_path: Path
) -> None:
    path, text = tmp_path / "config.toml", io.StringIO()
    path.write_text(config_to_toml(config), encoding="utf-8")
    plan_config(path, [], Console(file=text, width=200), measure=True)
    assert "s on this cpu, the median of 10; 3 steps take about" in text.getvalue()
    assert "GiB by the whole process, at most" in text.getvalue()
    cache = Path(config.data.cache or f"{config.output}/cache")
    assert any((cache / "latents").rglob("*.safetensors")) and not list(cache.glob("measure-*"))
    assert not (Path(config.output) / config.name).exists()


def steps_of(config: Config, tmp_path: Path, stop: StopRequests) -> Measured:
    path = tmp_path / "config.toml"
    path.write_text(config_to_toml(config), encoding="utf-8")
    opened, examples = inspect_run(read_draft(path, []), decode=False)
    return measure_steps(config, opened, examples, Console(file=io.StringIO()), stop)


def test_the_clock_starts_when_the_first_steps_are_over(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = [100.0, 100.0, *range(1, COUNTED + 1)]  # of which those after the first steps alone count
    ends = accumulate(gaps, initial=100.0)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(ends)))
    found = steps_of(config, tmp_path, StopRequests(print, leave=False))
    assert WARMING_UP == 3 and found.step_s == 5.5 and found.device == "cpu"
    assert found.rows(1800)["measured"] == "5.5 s on this cpu, the median of 10; 1800 steps take about 2 h 45 min"


def test_who_stops_it_is_told_no_numbers(config: Config, tmp_path: Path) -> None:
    stop = StopRequests(print, leave=False)
    stop.ask(signal.SIGTERM)
    with pytest.raises(Interrupted):
        steps_of(config, tmp_path, stop)
    assert not list(Path(config.data.cache or f"{config.output}/cache").glob("measure-*"))
