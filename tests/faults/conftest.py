"""Runs to which something happens."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sdtrain import FitResult, Record, fit, make_config
from sdtrain.config.schema import Config
from tests.conftest import merged, small_run


@dataclass
class Ran:
    """What a run left: its result or what it raised, what was shown, and the records that its watchers got."""

    folder: Path
    result: FitResult | None = None
    error: BaseException | None = None
    text: str = ""
    records: list[Record] = field(default_factory=list)

    def state(self, step: int) -> dict[str, bytes]:
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"}

    def states(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))

    def weights(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "weights").glob("*"))


Run = Callable[..., Ran]


def runner(table: dict[str, Any], cache: Path) -> Run:
    """Return a function that runs the table at 64 px, with dotted settings changed; what a run raises is returned."""

    def go(
        changes: dict[str, Any] | None = None,
        *,
        resume: bool | str = False,
        watchers: Sequence[Callable[[Record], None]] = (),
        overrides: Sequence[str] = (),
    ) -> Ran:
        small = {"data.resolution_px": 64, "data.bucket_step_px": 64, "data.max_aspect": 1.0, "data.cache": str(cache)}
        config: Config = make_config(merged(table, small | (changes or {})))
        text = io.StringIO()
        ran = Ran(Path(config.output) / config.name)
        try:
            ran.result = fit(
                config,
                overrides=overrides,
                resume=resume,  # type: ignore[arg-type]
                watchers=[ran.records.append, *watchers],
                console=Console(file=text, width=400),
            )
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test looks at it
            ran.error = error
        ran.text = text.getvalue()
        return ran

    return go


def until(there: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for what another thread does."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"not there after {seconds:.0f} s"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A hang-up is heard, whatever the tests were started with: `nohup` ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs, which is what a cache is for."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(table: dict[str, Any], cache: Path) -> Run:
    return runner(table, cache)


@pytest.fixture(scope="session")
def straight(pictures: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The run to which nothing happens."""
    table = small_run(tmp_path_factory.mktemp("straight"), pictures)
    ran = runner(table, cache)({"name": "straight", "checkpoint.every": 1, "checkpoint.keep": 9})
    assert ran.result is not None and ran.result.finished
    return ran
