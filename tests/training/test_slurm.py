"""The job script of the README for several machines, with stand-ins for what SLURM does in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from tests.conftest import merged
from tests.training.rank_team import free_port

pytestmark = pytest.mark.slow

README = Path(__file__).parents[2] / "README.md"
SRUN = """#!{python}
# Two tasks; where the run is asked to be, they are sent the signal once a step is done.
import os, pathlib, signal, subprocess, sys, time
tasks = []
for number in range(2):
    place = dict(SLURM_PROCID=str(number), SLURM_LOCALID=str(number), SLURM_NTASKS="2")
    tasks.append(subprocess.Popen(sys.argv[1:], env=os.environ | place))
log = pathlib.Path("{log}")
while "{stopped}" and not (log.exists() and log.stat().st_size) and tasks[0].poll() is None:
    time.sleep(0.05)
if "{stopped}":
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!{python}
import pathlib, sys
if sys.argv[1] == "show":
    print("127.0.0.1")
else:
    pathlib.Path("{there}").write_text(" ".join(sys.argv[1:]))
"""


@pytest.mark.parametrize("stopped", ["", "yes"])
def test_the_script_trains_on_all_its_tasks_and_is_queued_again(
    table: dict[str, Any], tmp_path: Path, stopped: str
) -> None:
    steps = 400 if stopped else 4
    settings = {"data.gradient_accumulation": 2, "device": "cpu", "steps": steps}
    (tmp_path / "my.toml").write_text(config_to_toml(resolve(merged(table, settings), "test config")))
    run = Path(table["output"]) / "small"
    there = tmp_path / "requeued"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text.format(python=sys.executable, log=run / "log.jsonl", stopped=stopped, there=there))
        program.chmod(0o755)
    found = re.search(r"```\n(#!/bin/bash\n#SBATCH --nodes=2.+?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert found is not None
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "one", "OMP_NUM_THREADS": "1"}
    script = found[1].replace("29400", str(free_port()))
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "2, which share the pictures of a step" in " ".join(done.stdout.split()), done.stdout + done.stderr
    assert there.exists() == bool(stopped)
    if stopped:
        assert there.read_text() == "requeue 7" and list((run / "checkpoints").glob("step-*"))
    else:
        assert (run / "weights" / "small.safetensors").exists()
