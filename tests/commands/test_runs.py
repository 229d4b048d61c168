"""What can be told of runs, in whatever state they are, and what can be done with one that is not finished."""

from __future__ import annotations

import json
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.commands.run_facts import Logged, facts_of, finished_weights, read_log
from sdtrain.commands.sample import draw
from sdtrain.commands.verify_resume import compare_runs, verdict_lines, verify_resume
from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from sdtrain.errors import UserError
from sdtrain.training.watching.records import Record, StepRecord

Train = Callable[..., tuple[Path, str]]


def sdtrain(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def stop_at(step: int) -> Callable[[Record], None]:
    def watch(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == step:
            signal.raise_signal(signal.SIGINT)

    return watch


@pytest.fixture
def stopped(train: Train) -> Path:
    """A run that was stopped after three of four steps, with states of steps 2 and 3."""
    settings = {"name": "stopped", "checkpoint.every": 2, "optimizer.d0": 1e-2}
    run, _ = train(settings, watchers=[stop_at(3)])
    return run


def test_runs_are_listed_with_how_they_stand_and_how_to_go_on(train: Train, stopped: Path) -> None:
    train({"name": "finished", "steps": 2})
    for name, damage in {"no-config": "config.toml", "no-state": "checkpoints/step-000003/state.json"}.items():
        shutil.copytree(stopped, stopped.parent / name)
        (stopped.parent / name / damage).write_text("{", encoding="utf-8")
    (stopped.parent / "cache").mkdir(exist_ok=True)
    told = sdtrain("runs", stopped.parent)
    found = {line.split()[0]: line for line in told.splitlines() if not line.startswith(" ")}
    assert sorted(found) == ["finished", "no-config", "no-state", "stopped"]
    assert re.search(r"finished +2 of 2 steps +loss \d\.\d{4} +\d+\.\d MiB", found["finished"])
    assert re.search(r"stopped +3 of 4 steps", found["stopped"])
    assert "damaged" in found["no-state"]
    assert re.search(r"stopped +3 of 4 steps", found["no-config"]), "a copy of its settings is in the state"
    assert f"sdtrain fit {stopped}/config.toml --resume\n" in told
    assert "finished/config.toml --resume --set steps=4\n" in told
    assert re.search(r"state\.json cannot be read .*; `--resume` goes on from the state before", told)


def test_a_run_that_is_trained_says_so(stopped: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with stopped.with_name(".stopped.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert facts_of(stopped).standing == "running"
    assert facts_of(stopped).standing == "stopped"


def test_a_run_with_more_steps_planned_is_not_finished_until_they_are_done(train: Train) -> None:
    run, _ = train({"steps": 1, "optimizer.d0": 1e-2})
    assert (facts_of(run).standing, facts_of(run).step) == ("finished", 1)
    train({"steps": 4, "optimizer.d0": 1e-2}, resume=True, watchers=[stop_at(2)])
    assert (facts_of(run).standing, facts_of(run).step) == ("stopped", 2)
    assert finished_weights(run) is None, "what is looked at is the newest state, not the older file"


def test_there_is_nothing_to_list_where_there_are_no_runs(tmp_path: Path) -> None:
    assert sdtrain("runs", tmp_path) == f"no runs in {tmp_path}\n"
    with pytest.raises(UserError, match="no such folder"):
        sdtrain("runs", tmp_path / "nowhere")


def test_a_run_that_is_not_finished_can_be_looked_at(stopped: Path, tmp_path: Path) -> None:
    newest = draw(stopped, ["a red circle"], [0], None, [])
    earlier = draw(stopped, ["a red circle"], [0], 2, [])
    assert (newest.title, earlier.title) == ("stopped, step 3", "stopped, step 2")
    assert newest.rows[0][0].tobytes() != earlier.rows[0][0].tobytes()
    from sdtrain.commands.files.export import export_run

    weights = export_run(stopped, "sd-scripts", 2, tmp_path / "two.safetensors").path
    exported = draw(weights, ["a red circle"], [0], None, [])
    assert near(exported.rows[0][0], earlier.rows[0][0]), "the averaged weights, as in every file"
    with pytest.raises(UserError, match="no training state of step 7; there are 2, 3"):
        draw(stopped, ["a red circle"], [0], 7, [])
    with pytest.raises(UserError, match="belongs to a run"):
        draw(weights, ["a red circle"], [0], 2, [])


def near(one: Image.Image, other: Image.Image) -> bool:
    """Weights that were merged and adapters that stand beside them differ by rounding."""
    return max(abs(left - right) for left, right in zip(one.tobytes(), other.tobytes(), strict=True)) <= 2


def test_info_tells_how_far_a_run_is(stopped: Path) -> None:
    told = sdtrain("info", stopped)
    for text in ("stopped", "3 of 4", "step 2, step 3", "builtin:tiny-sdxl", "lora on unet", "--resume"):
        assert text in told.replace("\n", " "), text
    assert "--step 2" in sdtrain("info", stopped, "--step", 2)
    with pytest.raises(UserError, match="there are 2, 3"):
        sdtrain("info", stopped, "--step", 9)
    with pytest.raises(UserError, match="is not the folder of a run"):
        sdtrain("info", stopped / "checkpoints" / "step-000002")


LINES = st.lists(
    st.binary(max_size=40) | st.sampled_from([b"5", b"[" * 5000, b'{"step": "x"}', b'{"step": 3}', b"\xff"])
)


@given(LINES)
def test_whatever_a_log_holds_what_can_be_read_of_it_is_told(lines: list[bytes]) -> None:
    good = {"step": 1, "loss": 0.5, "groups": {"unet": {"d": 1e-3}}}
    odd = {"step": 2, "loss": "x", "groups": {"unet": 5}, "validation": {"loss": None}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        path.write_bytes(b"\n".join([json.dumps(good).encode(), *lines, json.dumps(odd).encode()]))
        found = read_log(path)
    assert found.step >= 2 and found.loss is not None
    assert read_log(Path("nowhere")) == Logged()


def test_a_log_line_of_a_number_nobody_can_count_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": ' + "9" * 5000 + '}\n{"step": 4, "loss": 1e999}\n', encoding="utf-8")
    assert read_log(tmp_path / "log.jsonl") == Logged(step=4)


# ---------------------------------------------------------------------- verify-resume


def written(tmp_path: Path, table: dict[str, Any], **changes: Any) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(config_to_toml(resolve(table | changes, "test")), encoding="utf-8")
    return path


def test_a_resume_is_verified_in_one_line_and_leaves_nothing(tmp_path: Path, table: dict[str, Any]) -> None:
    optimizer = {"preset": "lora", "prodigy_steps": 300}
    path = written(tmp_path, table, steps=400, optimizer=optimizer, validation={"share": 0.5, "every": 1})
    verdict = verify_resume(path, [], steps=4)
    assert verdict.equal
    (line,) = verdict_lines(verdict)
    assert re.fullmatch(
        r"equal bit for bit: 4 steps straight and 2 \+ 2 with a resume between "
        r"\(4 losses, \d+ tensors of \d+\.\d MiB; \d+ s\)",
        line,
    )
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "cache").is_dir(), "encoded into the config's own cache"


def test_a_resume_that_is_not_exact_is_told_with_the_place(
    tmp_path: Path, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtrain.training import fit

    monkeypatch.setattr(fit, "load_state", lambda state, *_, **__: state.step)  # goes on from there with nothing loaded
    (line,) = verdict_lines(verify_resume(written(tmp_path, table), [], steps=4))
    assert re.fullmatch(
        r"NOT equal: 4 steps .* after 2: the loss of step 3 is 0\.\d+ straight and 0\.\d+ resumed", line
    )
    result = CliRunner().invoke(app, ["verify-resume", str(written(tmp_path, table)), "--steps", "2"])
    assert result.exit_code == 1
    with pytest.raises(UserError, match="2 at least"):
        verify_resume(written(tmp_path, table), [], steps=1)


def test_what_differs_first_is_named(train: Train) -> None:
    one, _ = train({"name": "one", "steps": 2})
    other, _ = train({"name": "other", "steps": 2})
    assert compare_runs(one, other, 2).difference == ""
    state = other / "checkpoints" / "step-000002" / "optimizer.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    assert re.match(
        r"step-000002/optimizer\.safetensors differs first in state\.\d+\.", compare_runs(one, other, 2).difference
    )
