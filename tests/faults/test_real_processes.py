"""The command itself, in a process of its own: real signals, a real terminal that hangs up, a pipe that closes."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from tests.conftest import merged
from tests.faults.conftest import until

SDTRAIN = [sys.executable, "-m", "sdtrain.cli"]

SIGNAL_IN = """
import os, signal, sys, time
from importlib import import_module
from pathlib import Path

place, pause = sys.argv[1], float(sys.argv[4])
after, first, again = (int(sys.argv[number]) for number in (2, 3, 5))
signal.signal(first, signal.SIG_DFL)  # whatever ignores it around these tests
module, _, name = place.rpartition(":")
owner = import_module(module)
*holders, last = name.split(".")
for holder in holders:
    owner = getattr(owner, holder)
original, calls = getattr(owner, last), 0

def with_signal(*arguments, **more):
    global calls
    calls += 1
    if calls == after:
        Path(os.environ["SENT"]).write_text(repr([time.time(), time.process_time()]))
        os.kill(os.getpid(), first)
        for _ in range(60 if again else 0):  # as somebody does who sees no answer yet
            time.sleep(pause)
            os.kill(os.getpid(), again)
    return original(*arguments, **more)

setattr(owner, last, with_signal)
sys.argv = ["sdtrain", "fit", *sys.argv[6:]]
from sdtrain.cli import main
main()
"""
"""Sends a signal from within a function, at its n-th call, and another one some time later."""

PLACES = {
    "load": ("sdtrain.models.load:load_model", 1),
    "encoding": ("sdtrain.models.sdxl:SDXL.encode_pixels", 3),
    "step": ("sdtrain.training.computing.objective:Objective.__call__", 3),
    "update": ("optim.stepper:Stepper.step", 3),
    "preview": ("sdtrain.models.sampling:guided", 7),
    "save": ("sdtrain.training.keeping.states:write_safetensors", 2),
}


def write(tmp_path: Path, table: dict[str, Any], changes: dict[str, Any]) -> Path:
    path = tmp_path / "config.toml"
    small = {"data.resolution_px": 64, "data.bucket_step_px": 64, "data.max_aspect": 1.0}
    path.write_text(config_to_toml(resolve(merged(table, small | changes), "test")), encoding="utf-8")
    return path


def steps_in(log: Path) -> list[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in lines if '"groups"' in line]


def wait_for_steps(log: Path, num: int, seconds: float = 180) -> None:
    until(lambda: len(steps_in(log)) >= num, seconds)


def cpu_of_children() -> float:
    """The seconds at work of all processes that were started and have ended: waiting for a busy machine is left out."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def newest_state(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_a_closed_pipe_does_not_end_the_training(tmp_path: Path, table: dict[str, Any]) -> None:
    """`sdtrain fit CONFIG | head -n 3`: it goes on in silence, and its exit code is that of the training."""
    path = write(tmp_path, table, {"steps": 30})
    with subprocess.Popen([*SDTRAIN, "fit", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        for _ in range(3):
            process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=240) == 0
        assert process.stderr.read() == b""
    assert steps_in(tmp_path / "runs" / "small" / "log.jsonl") == list(range(1, 31))
    assert (tmp_path / "runs" / "small" / "weights" / "small.safetensors").exists()


def test_a_terminal_that_hangs_up_saves(tmp_path: Path, table: dict[str, Any]) -> None:
    """A real one: a session of its own on a pseudo-terminal, whose other end is closed."""
    path = write(tmp_path, table, {"steps": 100_000})
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever ignores it around these tests
        os.execv(sys.executable, [*SDTRAIN, "fit", str(path)])
    run = tmp_path / "runs" / "small"
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + 180
    while len(steps_in(run / "log.jsonl")) < 3 and time.monotonic() < deadline:
        try:
            os.read(terminal, 65536)
        except BlockingIOError:
            time.sleep(0.05)
    began = time.monotonic()
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    print(f"hang-up to exit: {time.monotonic() - began:.2f} s")
    assert os.waitstatus_to_exitcode(status) == 129
    step = newest_state(run)
    assert step == steps_in(run / "log.jsonl")[-1] >= 3
    assert [file.name for file in (run / "weights").iterdir()] == [f"small-step-{step:06d}.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["/dev/full"])
def test_a_full_disk_under_stdout_does_not_end_the_training(tmp_path: Path, table: dict[str, Any], device: str) -> None:
    path = write(tmp_path, table, {"steps": 5})
    with Path(device).open("w") as full:
        assert subprocess.run([*SDTRAIN, "fit", path], stdout=full, check=False).returncode == 0
    assert steps_in(tmp_path / "runs" / "small" / "log.jsonl") == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: str(number.name)
)
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_at_any_moment_is_answered_and_has_its_code(
    tmp_path: Path, table: dict[str, Any], place: str, number: signal.Signals
) -> None:
    path = write(tmp_path, table, {"preview.every": 2, "preview.num_inference_steps": 3, "checkpoint.every": 2})
    sent = tmp_path / "sent"
    where, call = PLACES[place]
    before = cpu_of_children()
    result = subprocess.run(
        [sys.executable, "-c", SIGNAL_IN, where, str(call), str(int(number)), "0", "0", str(path)],
        env=os.environ | {"SENT": str(sent)},
        capture_output=True,
        text=True,
        check=False,
    )
    at, cpu_then = json.loads(sent.read_text())
    cpu = cpu_of_children() - before - cpu_then
    print(f"{place} {number.name}: {time.time() - at:.2f} s to exit, {cpu:.2f} s of them at work")
    print(textwrap.indent(result.stdout + result.stderr, "    "))
    assert result.returncode == 128 + number, result.stderr
    assert "Traceback" not in result.stderr
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert f"{name}: " in result.stderr
    run = tmp_path / "runs" / "small"
    if place in ("load", "encoding"):
        assert "nothing was trained yet, so there is nothing to save" in result.stderr
        assert not run.exists()
        return
    assert f"stopped by {name} after" in result.stdout
    assert newest_state(run) == steps_in(run / "log.jsonl")[-1]
    resumed = subprocess.run([*SDTRAIN, "fit", path, "--resume-or-start"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert steps_in(run / "log.jsonl") == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step", "save"])
def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path: Path, table: dict[str, Any], place: str) -> None:
    path = write(tmp_path, table, {"checkpoint.every": 1})
    where, call = PLACES[place][0], 3  # of a save: the first file of the second one
    interrupt = str(int(signal.SIGINT))
    began = tmp_path / "sent"
    result = subprocess.run(
        [sys.executable, "-c", SIGNAL_IN, where, str(call), interrupt, "1.0", interrupt, str(path)],
        env=os.environ | {"SENT": str(began)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{place}: {time.time() - json.loads(began.read_text())[0] - 1:.2f} s from the second Ctrl-C to exit")
    print(textwrap.indent(result.stderr, "    "))
    assert result.returncode == 130
    assert "left at once; the newest whole training state is" in result.stderr
    resumed = subprocess.run([*SDTRAIN, "fit", path, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert steps_in(tmp_path / "runs" / "small" / "log.jsonl") == [1, 2, 3, 4]


@pytest.mark.slow
def test_of_two_starts_at_once_one_trains_and_one_is_told(tmp_path: Path, table: dict[str, Any]) -> None:
    path = write(tmp_path, table, {"steps": 40})
    starts = [
        subprocess.Popen([*SDTRAIN, "fit", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in starts]
    assert sorted(code for _, _, code in ended) == [0, 2]
    told = next(error for _, error, code in ended if code == 2)
    print(told)
    assert "is being trained by process" in told
    assert steps_in(tmp_path / "runs" / "small" / "log.jsonl") == list(range(1, 41))


@pytest.mark.slow
def test_a_hang_up_that_is_ignored_stays_so(tmp_path: Path, table: dict[str, Any]) -> None:
    """`nohup sdtrain fit CONFIG &`: a hang-up is not to end it."""
    path = write(tmp_path, table, {"steps": 30})
    process = subprocess.Popen(
        ["nohup", *SDTRAIN, "fit", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_steps(tmp_path / "runs" / "small" / "log.jsonl", 2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=240) == 0
