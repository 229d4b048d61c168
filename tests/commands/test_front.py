"""The commands that explain: each tells the truth about the schema and the machine, to people and to programs."""

from __future__ import annotations

import ast
import json
import os
import re
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.commands.front import doctor
from sdtrain.commands.front.command_line import GROUPS
from sdtrain.commands.front.environment import HEEDED, told
from sdtrain.commands.front.settings import explained, json_schema, settings
from sdtrain.config.mistakes import all_settings
from sdtrain.config.paths import read_toml
from sdtrain.errors import UserError

CONFIGS = Path(__file__).parent.parent.parent / "configs"
NO_GPU = SimpleNamespace(
    version=SimpleNamespace(cuda="12.8", hip=None), cuda=SimpleNamespace(is_available=lambda: False)
)


def ask(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["version"] == 1
    assert found["command"] == arguments[0]
    return found


def test_every_setting_is_explained() -> None:
    assert {key.replace("[0]", "") for key in all_settings()} == set(settings())
    assert all(setting.description and setting.allowed and setting.default for setting in settings().values())


def test_a_setting_is_explained_with_what_presets_make_of_it() -> None:
    (found,) = ask("explain", "optimizer.d0")["settings"]
    assert found["presets"]["lora"] == "0.0001"
    assert found["allowed"] == "number > 0"
    assert found["default"] == "1e-06"


def test_a_setting_of_one_method_says_so_and_of_both_does_not() -> None:
    assert settings()["method.rank"].only == "lora"
    assert settings()["method.train"].only == ""
    assert settings()["method.kind"].allowed == "`lora`, `full`"
    both = settings()["method.layer_weights"].description
    assert "lora: " in both and "full: " in both


def test_a_section_and_a_last_name_are_explained_too() -> None:
    assert {setting.key for setting in explained("[checkpoint]")} == {
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.keep_every",
        "checkpoint.in_background",
    }
    assert [setting.key for setting in explained("patience")] == ["validation.patience"]


@hypothesis.settings(deadline=None)
@given(st.sampled_from(sorted(settings())), st.integers(0, 60))
def test_a_setting_that_lacks_a_letter_is_found_again(key: str, at: int) -> None:
    start = key.rfind(".") + 1
    at = start + at % (len(key) - start)
    written = key[:at] + key[at + 1 :]
    try:
        found = {setting.key for setting in explained(written)}
        assert found  # what is left may be a setting or a section itself
    except UserError as error:
        assert "did you mean" in str(error)


@hypothesis.settings(deadline=None)
@given(st.text(max_size=30))
def test_explain_answers_or_says_that_there_is_none(key: str) -> None:
    try:
        assert explained(key)
    except UserError as error:
        assert error.exit_code == 2


def test_the_presets_are_told() -> None:
    assert ask("presets")["presets"]["full"]["d0"] == 1e-6


def test_the_schema_beside_the_configs_is_the_one_of_today() -> None:
    """`sdtrain schema > configs/schema.json` writes it anew."""
    assert json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8")) == json_schema()
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == json_schema()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configs_name_the_schema_and_hold_only_what_it_knows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#:schema ./schema.json\n")
    schema = json_schema()
    for section, value in read_toml(text).items():
        assert section in schema["properties"]
        reference = schema["properties"][section].get("$ref")
        if reference:
            assert set(value) <= set(schema["$defs"][reference.rpartition("/")[2]]["properties"])


def test_check_answers_programs_when_all_is_well_and_when_not(tmp_path: Path) -> None:
    found = ask("check", str(CONFIGS / "quickstart.toml"))
    assert found["ok"] and not found["problems"]
    assert any("114 with a caption" in line for line in found["told"])
    bad = tmp_path / "bad.toml"
    bad.write_text('name = "x"\nsteps = -1\n', encoding="utf-8")
    found = ask("check", str(bad), code=2)
    assert not found["ok"]
    assert {"steps", "model", "method.kind", "data"} & {problem["where"] for problem in found["problems"]}


def test_runs_answers_programs_with_nothing_beside_the_answer(tmp_path: Path) -> None:
    assert ask("runs", str(tmp_path)) == {"version": 1, "command": "runs", "runs": []}


def test_the_doctor_names_what_is_missing() -> None:
    found = doctor.Findings()

    def version_of(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    doctor._libraries(found, version_of)
    assert found.facts["torch"] == "1.0"
    assert len(found.wrong) == 1 and "peft is not installed" in found.wrong[0] and "pip install peft" in found.wrong[0]


def test_the_doctor_says_why_torch_cannot_be_loaded() -> None:
    found = doctor.Findings()

    def load(name: str) -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    doctor._devices(found, load)
    assert "libcudart.so.12" in found.wrong[0] and "install it anew" in found.wrong[0]


def test_the_doctor_tells_a_missing_driver_from_hidden_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = doctor.Findings()
    doctor._devices(found, lambda name: NO_GPU)
    assert "driver is missing or older than 12.8" in found.wrong[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = doctor.Findings()
    doctor._devices(found, lambda name: NO_GPU)
    assert found.wrong == ["CUDA_VISIBLE_DEVICES hides every card; unset it"]


@pytest.mark.parametrize("faster", [True, False])
def test_the_doctor_tells_what_multiplies_on_the_cpu(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    monkeypatch.setattr("sdtrain.matmul.onednn_is_faster", lambda: faster)
    found = doctor.Findings()
    doctor._devices(found, lambda name: NO_GPU)
    assert found.facts["device"] == "cpu"
    assert found.facts["float32 products"] == ("by oneDNN" if faster else "by PyTorch's own choice")


def test_the_doctor_says_when_disk_and_memory_run_out(tmp_path: Path) -> None:
    found = doctor.Findings()
    doctor._disk(found, tmp_path / "not" / "yet", lambda path: namedtuple("Usage", "free")(2**30))
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8388608 kB\nMemAvailable:  2097152 kB\n", encoding="ascii")
    doctor._memory(found, meminfo)
    assert found.facts["disk"] == f"1.0 GiB free at {tmp_path}"
    assert found.facts["memory"] == "2.0 of 8.0 GiB free"
    assert [line.split(";")[0] for line in found.wrong] == [
        f"1.0 GiB are free at {tmp_path}",
        "2.0 GiB of memory are free",
    ]


def test_the_doctor_says_when_python_is_too_old() -> None:
    found = doctor.Findings()
    doctor._python(found, (3, 10))
    assert "older than 3.11" in found.wrong[0]


@pytest.mark.parametrize("command", ["", *sorted(get_command(app).commands)])  # type: ignore[attr-defined]
def test_help_fits_the_terminal_and_shows_no_python(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 120):
        monkeypatch.setitem(os.environ, "COLUMNS", str(width))
        text = CliRunner().invoke(app, [command, "--help"] if command else ["--help"], terminal_width=width).stdout
        assert not re.search(r"list\[|range>|<(Path|path|str|int|float|bool)>", text), text
        assert max(map(len, text.splitlines())) <= width
        if not command:
            assert ("its model and its pictures, without training." in text) == (width == 120)


def test_every_command_stands_in_a_group() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(commands)


# ---------------------------------------------------------------------- environment variables

ROOT = CONFIGS.parent
NAMED = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
OURS_ALONE = {"TORCHELASTIC_SIGNALS_TO_HANDLE"}
"""Set for the processes of `--gpus`, whatever it was: nobody else's value counts."""


def read_from_the_environment(path: Path) -> set[str]:
    """The names that a file takes from the environment; those that are in a variable come from its own constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=where, slice=key) if ast.unparse(where) in ENVIRONMENTS:
                keys = [key]
            case ast.Call(func=ast.Attribute(value=where), args=[key, *_]) if ast.unparse(where) in ENVIRONMENTS:
                keys = [key]
            case ast.Compare(left=key, comparators=[where]) if ast.unparse(where) in ENVIRONMENTS:
                keys = [key]
            case ast.Call(func=call, args=[key, *_]) if ast.unparse(call) == "os.getenv":
                keys = [key]
            case _:
                continue
        constant = all(isinstance(key, ast.Constant) for key in keys)
        texts = [
            one.value
            for part in (keys if constant else [tree])
            for one in ast.walk(part)
            if isinstance(one, ast.Constant)
        ]
        found |= {text for text in texts if isinstance(text, str) and NAMED.fullmatch(text)}
    return found


ENVIRONMENTS = ("os.environ", "environment", "environ")


def test_every_environment_variable_that_is_read_is_documented() -> None:
    sources = [path for package in ("sdtrain", "optim") for path in (ROOT / package).rglob("*.py")]
    read = set().union(*map(read_from_the_environment, sources)) - OURS_ALONE
    assert {"RANK", "MASTER_PORT", "XDG_CACHE_HOME", "CXX", "CUDA_VISIBLE_DEVICES"} <= read, "they are found"
    assert read <= set(HEEDED)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in readme for name in HEEDED)


def test_the_doctor_tells_what_is_set_and_keeps_secrets() -> None:
    found = told({"HF_TOKEN": "hf_secret", "NO_COLOR": "1", "HOME": "/"})
    assert set(found) == {"$HF_TOKEN", "$NO_COLOR"}
    assert "hf_secret" not in str(found) and found["$NO_COLOR"].startswith("'1' (")
