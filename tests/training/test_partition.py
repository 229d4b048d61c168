"""A run whose processes lie on two machines, between which the link is cut: it ends on both, and goes on from there.

The machines are network namespaces, which only root may make.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from tests.conftest import merged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ip") is None, reason="there is no `ip` of iproute2 here"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes network namespaces"),
]
LOST_S = 6
START = f"""
from sdtrain.training.ranks import pulse
pulse.BEAT_S, pulse.LOST_S, pulse.LAST_S = 0.5, {LOST_S}, 5.0
from sdtrain.cli import main
main()
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two namespaces with the addresses 10.77.0.1 and 10.77.0.2, joined by a cable whose ends are called like them."""
    names = [f"sdt{os.getpid()}a", f"sdt{os.getpid()}b"]
    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
            made.append(name)
        ends = [name[-14:] for name in names]
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def start(machine: str, rank: int, config: Path) -> subprocess.Popen[str]:
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29400",
    }
    environment = {**os.environ, **place, "GLOO_SOCKET_IFNAME": machine[-14:], "OMP_NUM_THREADS": "1"}
    command = ["ip", "netns", "exec", machine, sys.executable, "-c", START, "fit", str(config), "--plain"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_link_that_is_cut_ends_the_run_on_both_sides_and_it_goes_on_alone(
    machines: list[str], tmp_path: Path, table: dict[str, Any]
) -> None:
    settings = {"steps": 100_000, "data.batch_size": 1, "data.gradient_accumulation": 2, "device": "cpu"}
    config = tmp_path / "c.toml"
    config.write_text(config_to_toml(resolve(merged(table, settings), "test")), encoding="utf-8")
    processes = [start(machine, rank, config) for rank, machine in enumerate(machines)]
    log = tmp_path / "runs" / "small" / "log.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count('"groups"') > 3):
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.1)
        ip("-n", machines[0], "link", "set", machines[0][-14:], "down")
        cut = time.monotonic()
        told = [process.communicate(timeout=LOST_S + 60)[0] for process in processes]
        assert time.monotonic() - cut < LOST_S + 45
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], told
    assert f"rank 1 has not been heard of for {LOST_S} s" in told[0], told[0]
    assert f"for {LOST_S} s" in told[1] and "Traceback" not in told[0] + told[1], told[1]
    [state] = (tmp_path / "runs" / "small" / "checkpoints").iterdir()
    step = int(state.name.removeprefix("step-"))
    assert step >= 3
    command = [sys.executable, "-m", "sdtrain", "fit", str(config), "--resume", "--set", f"steps={step + 1}"]
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"groups"' in line]
    assert steps == list(range(1, step + 2))
