"""Every command that tells something answers programs: one JSON object on one line, and nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.commands.front.answers import answer
from sdtrain.config.write import config_to_toml

WITHOUT = {
    "fit": "its log.jsonl is written for programs, a line a step",
    "schema": "what it prints is JSON",
}
Train = Callable[..., tuple[Path, str]]


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name}{key} ")
        else:
            yield name + key, command


def ask(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1, "one line"
    found: dict[str, Any] = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (found["version"], found["command"]) == (1, arguments[0])
    return found


def test_every_command_that_tells_something_has_json() -> None:
    having = {
        name: any("--json" in option.opts for option in command.params) for name, command in commands(get_command(app))
    }
    assert {name for name, has in having.items() if not has} == set(WITHOUT)


NUMBERS = st.floats() | st.integers() | st.text() | st.none() | st.just(Path("a"))


@given(st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.floats(), inner)))
def test_whatever_is_found_the_answer_is_json(value: Any) -> None:
    import io
    from contextlib import redirect_stdout

    out = io.StringIO()
    with redirect_stdout(out):
        answer("x", {"value": value})
    assert out.getvalue().count("\n") == 1
    json.loads(out.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def run(train: Train) -> Path:
    return train({"steps": 2, "checkpoint.every": 1})[0]


def test_a_run_its_states_and_its_weights_are_told_and_written(run: Path, tmp_path: Path) -> None:
    whole = ask("info", run)
    assert (whole["standing"], whole["step"], whole["states"]) == ("finished", 2, [1, 2])
    assert whole["weights"] == ["small.safetensors"] and whole["d"]["unet"] > 0
    assert whole["go_on"].startswith("sdtrain fit ")
    state = ask("info", run, "--step", 1)
    assert Path(state["state"]).is_dir() and state["num_bytes"] > 0
    weights = run / "weights" / "small.safetensors"
    file = ask("info", weights)
    assert (file["kind"], file["ranks"], file["steps"]) == ("lora", {"2": file["num_modules"]["unet"]}, 2)
    assert file["num_bytes"] == weights.stat().st_size
    assert {"width_px", "height_px", "pictures"} == set(file["buckets"][0])
    for written in (
        ask("report", run),
        ask("export", run, "--format", "diffusers", "--out", tmp_path / "a.safetensors"),
    ):
        assert Path(written["written"][0]).exists()
    assert "facts" in ask("compare", weights, weights, "--base", "builtin:tiny-sdxl")


def test_what_a_step_trains_on_is_told(run: Path) -> None:
    found = ask("view", run / "config.toml", "--step", 2)
    (batch,) = found["batches"]
    assert [set(one) for one in batch] == [
        {"path", "caption", "timestep", "width_px", "height_px", "crop", "mask"}
    ] * len(batch)
    assert Path(batch[0]["path"]).is_file() and 0 <= batch[0]["timestep"] < 1000


def test_a_sheet_a_plan_and_the_cache_are_told(run: Path, tmp_path: Path) -> None:
    config = run / "config.toml"
    (sheet,) = ask("view", config, "--out", tmp_path / "sheet.html")["written"]
    assert Path(sheet).is_file()
    plan = ask("plan", config)
    assert plan["peak_bytes"] == max(phase["peak_bytes"] for phase in plan["phases"].values())
    assert ask("plan", config, "--fit-to", "1GB")["settings"] == []
    (cache,) = ask("cache", config, "--size")["caches"]
    assert cache["used_files"] == cache["files"] > 0 and cache["lacking_files"] == 0
    (pruned,) = ask("cache", config, "--prune", "--yes")["caches"]
    assert pruned["removed_files"] == 0


def test_a_resume_is_verified_for_programs(tmp_path: Path, table: dict[str, Any]) -> None:
    from sdtrain.config.read import resolve

    path = tmp_path / "mine.toml"
    path.write_text(config_to_toml(resolve(table, "test")), encoding="utf-8")
    found = ask("verify-resume", path, "--steps", 2)
    assert found["equal"] is True and found["difference"] == "" and found["num_losses"] == 2


def test_what_became_of_the_options_of_kohya_is_told(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.toml"
    theirs.write_text(
        'pretrained_model_name_or_path = "x.safetensors"\nnetwork_dim = 8\nno_such = 1\n', encoding="utf-8"
    )
    found = ask("import-kohya", theirs)
    became = {one["option"]: one["became"] for one in found["options"]}
    assert became["network_dim"] == "setting" and became["no_such"] == "unknown"
    assert found["written"] is None and "rank = 8" in found["config"]


def test_recipes_and_first_configs_are_told(tmp_path: Path, pictures: Path) -> None:
    assert "quickstart" in ask("configs", "list")["configs"]
    assert ask("configs", "copy", "sdxl_lora", tmp_path / "copy.toml")["written"] == [str(tmp_path / "copy.toml")]
    begun = ask("init", tmp_path / "first.toml", "--model", "builtin:tiny-sdxl", "--pictures", pictures)
    assert Path(begun["written"][0]).is_file()


REFUSED: dict[str, list[str]] = {
    "check": ["no.toml"],
    "plan": ["no.toml"],
    "view": ["no.toml"],
    "cache": ["no.toml"],
    "verify-resume": ["no.toml"],
    "import-kohya": ["no.toml"],
    "init": ["--yes", "--model", "nowhere", "--pictures", "nowhere"],
    "explain": ["method.rnak"],
    "configs copy": ["nothing"],
    "info": ["no.safetensors"],
    "sample": ["no.safetensors", "--prompt", "a"],
    "compare": ["no-run"],
    "export": ["no-run", "--format", "folder"],
    "merge": ["no.safetensors", "no.safetensors", "--out", "a.safetensors"],
    "resize": ["no.safetensors", "--base", "builtin:tiny-sdxl", "--rank", "2", "--out", "a.safetensors"],
    "extract": ["no.safetensors", "no.safetensors", "--rank", "2", "--out", "a.safetensors"],
    "report": ["no-run"],
    "card": ["no-run"],
    "push": ["no-run", "someone/something"],
}
"""Commands that are asked for what cannot be; the others can refuse nothing."""


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_refused_is_an_answer_too(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the exit code and the text that a person gets."""
    from sdtrain.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sdtrain", *command.split(), *REFUSED[command], "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    assert left.value.code == 2, told.err
    assert told.out.count("\n") == 1, told.out
    found = json.loads(told.out)
    assert (found["version"], found["command"], found["ok"]) == (1, command.split()[0], False)
    assert found["problems"] and all(problem["what"] for problem in found["problems"])
    if command != "check":
        assert all(problem["what"].split()[0] in told.err for problem in found["problems"])
    assert not list(tmp_path.iterdir())


def test_without_json_what_is_refused_is_told_to_people_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdtrain.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sdtrain", "info", "no.safetensors", "--", "--json"])
    with pytest.raises(SystemExit):
        main()
    monkeypatch.setattr("sys.argv", ["sdtrain", "info", "no.safetensors"])
    with pytest.raises(SystemExit):
        main()
    assert not capsys.readouterr().out


def test_all_commands_that_can_refuse_are_asked() -> None:
    can = (
        {name for name, _ in commands(get_command(app))} - set(WITHOUT) - {"presets", "doctor", "configs list", "runs"}
    )
    assert can == set(REFUSED)
