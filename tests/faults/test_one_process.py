"""A run has one process; a script needs one command to start it, to go on with it and to find it done."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdtrain import Record, StepRecord
from sdtrain.commands import fit as command
from sdtrain.errors import UserError
from sdtrain.files.temporary import temporary_name
from sdtrain.training.ending.one_process import holder_of, only_process
from tests.faults.conftest import Ran, Run

HOLD = """
import sys, pathlib
from sdtrain.training.ending.one_process import only_process
with only_process(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_start_is_refused_before_the_model_is_loaded_and_says_who_trains(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sdtrain.training.ending.one_process.PATIENCE_S", 0.1)
    monkeypatch.setattr(command, "inspect_run", lambda *arguments, **more: pytest.fail("the model was opened"))
    with only_process(tmp_path / "runs" / "small"):
        ran = run()
    assert isinstance(ran.error, UserError) and ran.error.exit_code == 2
    assert f"is being trained by process {os.getpid()} on {platform.node()}, since 20" in str(ran.error)
    assert "choose another `name`" in str(ran.error)
    assert not ran.folder.exists()


def test_a_lock_is_free_when_its_process_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small"
    arguments = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert holder_of(folder).startswith(f"process {process.pid} on ")
        process.kill()
    assert holder_of(folder) == ""
    with only_process(folder):
        pass


def test_a_run_is_the_same_by_whatever_link_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtrain.training.ending.one_process.PATIENCE_S", 0.1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    with only_process(tmp_path / "runs" / "small"):
        with pytest.raises(UserError, match="is being trained by"), only_process(tmp_path / "link" / "small"):
            pass
        with only_process(tmp_path / "runs" / "other"):
            pass


def test_nobody_is_said_to_train_where_nobody_does(tmp_path: Path) -> None:
    assert holder_of(tmp_path / "nowhere" / "small") == ""
    assert not (tmp_path / "nowhere").exists()
    with only_process(tmp_path / "small"):
        pass
    assert holder_of(tmp_path / "small") == ""


def test_a_launcher_with_one_process_is_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run({"steps": 1}).error is None


def files(ran: Ran) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in ran.folder.rglob("*") if path.is_file()}


def test_one_command_starts_goes_on_and_finds_a_run_done(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 2:
            signal.raise_signal(signal.SIGUSR1)

    first = run(resume="auto", watchers=[stop])
    assert first.result is not None and first.result.exit_code == 138
    second = run(resume="auto")
    assert second.result is not None and second.result.finished and "of which 2 are done" in second.text
    assert second.state(4) == straight.state(4)
    before = files(second)
    monkeypatch.setattr(command, "inspect_run", lambda *arguments, **more: pytest.fail("the model was opened"))
    own = temporary_name(second.folder / "report.html", "partial")
    left = own.with_name(own.name.replace(f"-{os.getpid()}-", "-4194305-"))  # of a process that cannot be
    left.write_bytes(b"half a page")
    third = run(resume="auto")
    assert third.result is not None and third.result.finished and third.result.exit_code == 0
    assert not left.exists(), "of a kill after everything else was written"
    assert "done: all 4 steps" in third.text
    assert files(third) == before
    monkeypatch.undo()
    longer = run({"steps": 5}, resume="auto")
    assert longer.result is not None and longer.result.steps == 5


def test_a_kill_before_anything_was_written_is_no_obstacle(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs" / "small").mkdir(parents=True)
    ran = run({"steps": 1}, resume="auto")
    assert ran.result is not None and ran.result.finished


def test_plain_resume_and_plain_start_are_as_they_were(run: Run) -> None:
    nothing = run(resume=True)
    assert isinstance(nothing.error, UserError) and "there is no run in this folder" in str(nothing.error)
    run({"steps": 1})
    again = run({"steps": 1})
    assert isinstance(again.error, UserError) and "holds a finished run" in str(again.error)


def test_a_run_that_was_given_more_steps_and_stopped_is_not_called_finished(run: Run) -> None:
    run({"steps": 1})

    def stop(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 2:
            signal.raise_signal(signal.SIGTERM)

    stopped = run({"steps": 3}, resume=True, watchers=[stop])
    assert stopped.result is not None and not stopped.result.finished
    again = run({"steps": 3})
    assert isinstance(again.error, UserError) and "holds a run that was not finished; add --resume" in str(again.error)


def test_mistakes_are_told_together_also_where_a_run_is_being_trained(run: Run, tmp_path: Path) -> None:
    ran = run(overrides=["timesteps.first=999", "data.bucket_step_px=65"])
    assert isinstance(ran.error, UserError) and len(ran.error.problems) >= 2
    assert not (tmp_path / "runs").exists(), "nothing was written, not even a lock"
