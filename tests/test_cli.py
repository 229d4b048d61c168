"""The command line as a person meets it: exit codes, messages, what is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from tests.conftest import small_run

SDTRAIN = [sys.executable, "-m", "sdtrain.cli"]


def write(tmp_path: Path, table: dict[str, Any]) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(config_to_toml(resolve(table, "test")), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SDTRAIN, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["--help", "check", "view"])
def test_help_check_and_view_never_import_torch(tmp_path: Path, table: dict[str, Any], command: str) -> None:
    arguments = ["--help"] if command == "--help" else ["check", str(write(tmp_path, table))]
    code = f"""
import sys
sys.argv = ["sdtrain", *{arguments!r}]
from sdtrain.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "diffusers", "transformers", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_check_says_what_a_run_would_see(tmp_path: Path, table: dict[str, Any]) -> None:
    result = run("check", write(tmp_path, table))
    assert result.returncode == 0, result.stderr
    assert "no problems found" in result.stdout
    assert "6 with a caption" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_all_problems_of_a_config_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        'name = "x"\nsteps = "many"\n[model]\npath = "builtin:tiny-sdxl"\n[method]\nkind = "lora"\nrnak = 4\n'
        f'[data]\nresolution_px = 64\n[[data.folder]]\npath = "{tmp_path}"\n[optimizer]\nmax_grad_norm = 1.0\n',
        encoding="utf-8",
    )
    for command in ("check", "fit"):
        result = run(command, path)
        assert result.returncode == 2
        assert "4 problems" in result.stderr
        assert "did you mean `rank`?" in result.stderr
        assert "steps" in result.stderr and "'many'" in result.stderr
        assert "gradient clipping has no effect" in result.stderr
        assert "no pictures in" in result.stderr
        assert "Traceback" not in result.stderr


def test_bad_pictures_are_named_with_the_reason(tmp_path: Path, table: dict[str, Any]) -> None:
    folder = tmp_path / "bad pictures"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    (folder / "broken.txt").write_text("a caption")
    (folder / "lonely.txt").write_text("a caption without a picture")
    table["data"]["folder"] = [{"path": str(folder)}]
    table["model"]["path"] = str(tmp_path / "no model")
    result = run("check", write(tmp_path, table))
    assert result.returncode == 2
    assert "broken.png" in result.stderr
    assert "lonely.txt" in result.stderr
    assert "no such" in result.stderr and "no model" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The config of a run of two steps, and what `sdtrain fit` said of it in a process of its own."""
    folder = tmp_path_factory.mktemp("done")
    path = write(folder, small_run(folder, pictures) | {"steps": 2})
    return path, run("fit", path)


Done = tuple[Path, subprocess.CompletedProcess[str]]


def test_a_finished_run_is_not_written_over(done: Done) -> None:
    path, first = done
    assert first.returncode == 0, first.stderr
    before = {file: file.read_bytes() for file in (path.parent / "runs").rglob("*") if file.is_file()}
    result = run("fit", path)
    assert result.returncode == 2
    assert "holds a finished run" in result.stderr
    changed = run("fit", path, "--resume", "--set", "seed=5", "--set", "steps=3")
    assert changed.returncode == 2
    assert "seed" in changed.stderr and "was 0" in changed.stderr
    now = {file: file.read_bytes() for file in (path.parent / "runs").rglob("*") if file.is_file()}
    assert {file: content for file, content in now.items() if "samples" not in file.parts} == {
        file: content for file, content in before.items() if "samples" not in file.parts
    }


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, table: dict[str, Any]) -> None:
    path = write(tmp_path, table | {"steps": 100_000})
    process = subprocess.Popen([*SDTRAIN, "fit", str(path)], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "runs" / "small" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in output
    step = int((next((tmp_path / "runs" / "small" / "checkpoints").iterdir())).name.removeprefix("step-"))
    assert step == len(log.read_text().splitlines()) >= 2  # from where tests/faults go on


@pytest.mark.slow
def test_sample_draws_with_the_weights_of_a_run(done: Done, tmp_path: Path) -> None:
    path, _ = done
    result = run("sample", path.parent / "runs" / "small", "--prompt", "a red circle", "--seed", "3")
    assert result.returncode == 0, result.stderr
    assert (path.parent / "runs" / "small" / "samples" / "grid.png").exists()
    missing = run("sample", tmp_path / "nothing.safetensors", "--prompt", "a red circle")
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr


def test_the_output_is_plain_where_there_is_no_terminal(done: Done) -> None:
    _, result = done
    assert "\x1b" not in result.stdout
    assert "step 2/2" in result.stdout
    assert result.stderr == ""


def test_the_version_is_told() -> None:
    from sdtrain.cli import app

    assert CliRunner().invoke(app, ["--version"]).output.startswith("sdtrain ")
