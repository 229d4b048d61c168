"""A process of the command line ends at once, and yet does all that others do at their end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENDING = """
import atexit, sys, threading, time
from sdtrain import cli
class Kept:
    def __del__(self):
        open("taken apart", "w").close()
kept = Kept()
kept.itself = kept
def late():
    time.sleep(0.3)
    print("a thread")
threading.Thread(target=late).start()
atexit.register(print, "registered")
sys.stderr.write("unflushed ")
cli.main = lambda: sys.exit({code})
cli.command()
"""


def ended(text: str, folder: Path, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", text]
    return subprocess.run(
        command, cwd=folder, env=buffered, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
    )


@pytest.mark.parametrize(("code", "found"), [("2", 2), ("0", 0), ("", 0), ("143", 143)])
def test_threads_registered_functions_and_buffers_are_not_cut_off(tmp_path: Path, code: str, found: int) -> None:
    done = ended(ENDING.replace("{code}", code), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (found, "a thread\nregistered\n", "unflushed ")
    assert not (tmp_path / "taken apart").exists(), "nobody looks through what is left"


def test_a_text_instead_of_a_code_is_told_as_python_tells_it(tmp_path: Path) -> None:
    done = ended('from sdtrain import cli\nimport sys\ncli.main = lambda: sys.exit("so")\ncli.command()', tmp_path)
    assert (done.returncode, done.stderr) == (1, "so\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device")
def test_what_cannot_be_written_is_told_as_python_tells_it(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = ended(
            'from sdtrain import cli\ncli.main = lambda: print("text")\ncli.command()', tmp_path, full.fileno()
        )
    assert done.returncode == 120 and "No space left on device" in done.stderr


def test_an_error_of_the_program_is_told_as_python_tells_it(tmp_path: Path) -> None:
    done = ended("from sdtrain import cli\ncli.main = lambda: 1 / 0\ncli.command()", tmp_path)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
