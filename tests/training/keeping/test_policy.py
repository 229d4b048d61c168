"""The states that stay are the last few good ones, every so many steps, and the best."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.config.schema import CheckpointConfig
from sdtrain.training.keeping.leftovers import remove_leftovers
from sdtrain.training.keeping.manifest import SavedState, saved_states
from sdtrain.training.keeping.newest import find_newest
from sdtrain.training.keeping.policy import best_step, mark_best, pass_over, superfluous
from tests.faults.small_states import run_with_states


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(1, 60), st.booleans(), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(0, 10),
    st.none() | st.integers(1, 60),
    st.data(),
)
def test_good_states_never_go_for_doubtful_or_later_ones(
    states: dict[int, bool], keep: int, keep_every: int, best: int | None, data: st.DataObject
) -> None:
    step = data.draw(st.sampled_from(sorted(states)))
    saved = [SavedState(Path(), number, loss_was_finite=good) for number, good in sorted(states.items())]
    gone = {state.step for state in superfluous(saved, step, CheckpointConfig(keep=keep, keep_every=keep_every), best)}
    assert step not in gone, "what was just saved stays"
    assert best not in gone and not any(number > step for number in gone)
    good = [number for number, is_good in sorted(states.items()) if is_good and number <= step]
    assert not gone & set(good[-keep:])
    assert gone & set(good) == {
        number for number in good[:-keep] if number != best and (not keep_every or number % keep_every)
    }
    doubtful = [number for number, is_good in states.items() if not is_good and number <= step and number != best]
    assert len(set(doubtful) - gone) <= 1


def test_the_best_state_stays_until_another_is_better(tmp_path: Path) -> None:
    run = run_with_states(tmp_path, 2)
    mark_best(tmp_path, 1)
    for expected in ([1, 3], [1, 4]):
        run.step()
        run.save(tmp_path, keep=1)
        assert [state.step for state in saved_states(tmp_path)] == expected
    mark_best(tmp_path, 4)
    run.step()
    run.save(tmp_path, keep=1)
    assert [state.step for state in saved_states(tmp_path)] == [4, 5]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"step": "4"}', "[" * 9999])
def test_a_mark_that_cannot_be_read_is_no_mark(tmp_path: Path, content: str) -> None:
    assert best_step(tmp_path) is None
    (tmp_path / "best.json").write_text(content)
    assert best_step(tmp_path) is None


def test_states_of_every_so_many_steps_stay(tmp_path: Path) -> None:
    run = run_with_states(tmp_path, 0)
    for _ in range(7):
        run.step()
        run.save(tmp_path, keep=1, keep_every=3)
    assert [state.step for state in saved_states(tmp_path)] == [3, 6, 7]


def test_a_damaged_later_state_is_set_aside_and_goes_once_the_run_is_there_again(tmp_path: Path) -> None:
    run_with_states(tmp_path, 4)
    (tmp_path / "step-000004" / "state.json").write_bytes(b"")
    for folder, _ in find_newest(tmp_path).passed_over:
        pass_over(folder)
    run = run_with_states(tmp_path.parent / "elsewhere", 2)
    run.save(tmp_path, keep=1)
    assert "passed-over-step-000004" in {path.name for path in tmp_path.iterdir()}, "the run is not there yet"
    assert find_newest(tmp_path).state is not None
    run.step()
    run.step()
    run.save(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]
    assert not find_newest(tmp_path).passed_over


# ---------------------------------------------------------------- leftovers


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with all that kills have ever left in one."""
    folder = tmp_path / "run"
    run_with_states(folder / "checkpoints", 3)
    (folder / "weights").mkdir()
    return folder


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_kills_left_goes_and_what_a_user_left_stays(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / ".step-000005.partial").mkdir()
    (checkpoints / ".step-000005.partial" / "parameters.safetensors").write_bytes(b"half")
    (run / "weights" / f".small.safetensors.{ended_process()}.part").write_bytes(b"half")
    (checkpoints / "step-000001" / "state.json").unlink()  # its removal was cut
    (checkpoints / "step-000001" / "parameters.safetensors").unlink()
    users = ["step-000003.bak", "step-000003 (copy)", "notes.txt", ".hidden", "step-000002"]
    for name in users[:2]:
        shutil.copytree(checkpoints / "step-000003", checkpoints / name)
        (checkpoints / name / "state.json").unlink()
    (checkpoints / "notes.txt").write_text("mine")
    (checkpoints / ".hidden").write_text("mine")
    (checkpoints / "step-000002" / "state.json").unlink()
    (checkpoints / "step-000002" / "notes.txt").write_text("mine")
    assert remove_leftovers(run) == [checkpoints / "step-000001"]
    assert {path.name for path in checkpoints.iterdir()} == {"step-000003", *users}
    assert not list((run / "weights").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_cannot_be_removed_is_no_reason_not_to_train(run: Path) -> None:
    (run / "weights" / ".small.safetensors.1.part").write_bytes(b"half")
    (run / "weights").chmod(0o500)
    remove_leftovers(run)
