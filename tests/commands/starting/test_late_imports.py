"""A process of its own imports no packages that a run does not use, and imports fast; others' stay as they are."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from sdtrain.commands import libraries


@pytest.fixture(autouse=True)
def a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(libraries._Process, "is_ours", False)
    monkeypatch.setattr(libraries, "CROWDED", ())  # see test_bare.py
    monkeypatch.setattr(libraries, "unmarked", nullcontext)  # see test_uncompiled.py
    for name in libraries.QUANTISERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.enable()
    gc.unfreeze()


def is_found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_a_run_in_a_process_of_its_own_leaves_the_packages_away() -> None:
    libraries.process_is_ours()
    with libraries.importing_less(quantised=False, networks=False):
        pass
    assert not any(is_found(name) for name in libraries.QUANTISERS)
    with pytest.raises(ImportError):
        import torchao  # noqa: F401


@pytest.mark.parametrize(("ours", "quantised"), [(False, False), (True, True)])
def test_they_stay_for_others_and_for_a_quantised_base(ours: bool, quantised: bool) -> None:
    if ours:
        libraries.process_is_ours()
    before = dict(sys.modules)
    with libraries.importing_less(quantised=quantised, networks=False):
        assert sys.modules == before
    assert sys.modules == before


@pytest.mark.parametrize(("ours", "compiles"), [(True, False), (True, True), (False, False)])
def test_the_compiler_is_left_away_in_a_process_of_its_own_that_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, ours: bool, compiles: bool
) -> None:
    asked = list[bool]()
    monkeypatch.setattr(libraries, "unmarked", lambda: nullcontext(asked.append(True)))
    if ours:
        libraries.process_is_ours()
    with libraries.importing_less(compiles=compiles, networks=False):
        assert bool(asked) == (ours and not compiles)


def test_what_somebody_has_imported_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", sys)
    libraries.process_is_ours()
    with libraries.importing_less(quantised=False, networks=False):
        assert sys.modules["torchao"] is sys


@pytest.mark.parametrize(
    ("load", "chosen", "spins"),
    [
        ("0.00 0.01 0.05 1/345 12\n", {}, None),
        ("0.00 0.01 0.05 2/345 12\n", {}, "1000"),
        ("9.00 9.01 9.05 2/345 12\n", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("9.00 9.01 9.05 2/345 12\n", {"OMP_WAIT_POLICY": "active"}, None),
        ("", {}, None),
        (None, {}, None),
    ],
)
def test_threads_sleep_while_they_wait_where_other_programs_compute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: str | None, chosen: dict[str, str], spins: str | None
) -> None:
    told = tmp_path / "loadavg"
    if load is not None:
        told.write_text(load)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    others = libraries.others_compute
    monkeypatch.setattr(libraries, "others_compute", lambda: others(told))
    libraries.process_is_ours()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    os.environ.pop("GOMP_SPINCOUNT", None)


@pytest.mark.parametrize("idle_at", [0, 1, libraries.LOOKS - 1, None])
def test_what_runs_for_a_moment_beside_the_start_does_not_compute(
    monkeypatch: pytest.MonkeyPatch, idle_at: int | None
) -> None:
    looks = [look != idle_at for look in range(libraries.LOOKS)]
    monkeypatch.setattr(libraries, "_others_run", lambda _: looks.pop(0))
    assert libraries.others_compute() == (idle_at is None)
    assert len(looks) == (0 if idle_at is None else libraries.LOOKS - 1 - idle_at)


def test_no_garbage_is_looked_for_while_libraries_are_imported_and_afterwards_as_usual_but_not_in_them() -> None:
    usual = gc.get_threshold()
    libraries.process_is_ours()
    assert gc.get_threshold() == libraries.SELDOM and gc.isenabled()
    with libraries.importing_less(quantised=False, networks=False):
        assert not gc.isenabled()
    libraries.look_for_garbage()
    assert gc.get_threshold() == usual and gc.isenabled()
    kept = gc.get_freeze_count()
    assert kept > 10_000 and len(gc.get_objects()) < kept / 10


def test_a_run_in_the_process_of_others_leaves_their_garbage_to_them() -> None:
    gc.set_threshold(12345, 6, 7)
    with libraries.importing_less(quantised=False, networks=False):
        assert gc.isenabled()
    libraries.look_for_garbage()
    assert gc.get_threshold() == (12345, 6, 7) and gc.get_freeze_count() == 0


def test_a_run_trains_with_garbage_looked_for_as_usual(train: Callable[..., tuple[Path, str]]) -> None:
    usual, seen = gc.get_threshold(), list[tuple[int, int, int]]()
    libraries.process_is_ours()
    train({"steps": 1, "data.resolution_px": 64}, watchers=[lambda _: seen.append(gc.get_threshold())])
    assert set(seen) == {usual}
