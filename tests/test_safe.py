"""Other people's words are shown, never obeyed; other people's files are read, never run."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.commands.check import check_config
from sdtrain.commands.files.info import file_info
from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from sdtrain.data.captions.text import CaptionError, decode, read_text, texts_of
from sdtrain.errors import Problem, UserError, printable
from sdtrain.training.watching.text import facts_table, hand_out, say, shell_word

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("sdtrain", "optim") for path in (ROOT / package).rglob("*.py"))
Train = Callable[..., tuple[Path, str]]
EVIL = (
    "[bold red]P[/] [link=http://evil]c[/link] [/v2] [v2] :smile: \x1b]0;owned\x07\x1b[2J\x9b31m a\u202eb\nnext\r\udcff"
)


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


# ---------------------------------------------------------------------- nothing is run


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_could_be_a_program_is_loaded(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not modules & {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in modules
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code", "code of a model's author is never run"
            assert node.arg != "shell" or ast.unparse(node.value) == "False"
            assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False"
    for call in calls(path):
        name = name_of(call)
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), name
        if name in ("torch.load", "load") and name.startswith("torch"):
            assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)


def test_libraries_load_tokenizers_alone() -> None:
    """What they load of models could be pickles; our own reader takes safetensors and nothing else."""
    for path in SOURCES:
        for call in calls(path):
            if name_of(call).endswith("from_pretrained"):
                assert "Tokenizer" in name_of(call), f"{path}: {ast.unparse(call)}"


# ---------------------------------------------------------------------- what is shown


@given(st.text() | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"])))
@example(EVIL)
def test_what_is_shown_holds_nothing_that_steers_a_terminal(text: str) -> None:
    found = printable(text)
    found.encode("utf-8")
    for char in found:
        assert unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.category(char) != "Cf" or char in "\u200c\u200d"
    assert printable(found) == found


@pytest.mark.parametrize("text", ["ein Bild, größer", "日本語　の 絵", "नमस्ते", "👩‍🚀 café", "a\\b [x] ~ `q`", ""])
def test_what_people_write_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text


@given(st.text(max_size=60))
@example(EVIL)
@example("[/v2]")
@example("a:smile:b")
def test_a_line_is_shown_letter_by_letter(text: str) -> None:
    for terminal in (False, True):
        out = io.StringIO()
        say(Console(file=out, width=40, force_terminal=terminal), text)
        assert out.getvalue() == printable(text) + "\n"
        table = io.StringIO()
        Console(file=table, width=10_000).print(facts_table({text: text}))
        assert "\x1b" not in table.getvalue()
        assert printable(text).strip() in table.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_document_is_handed_out_as_it_is_and_in_a_terminal_letter_by_letter(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    document = 'a = "b"\n# \x9b31m\u202e\u2028\nb = 2\n'
    hand_out(document)
    assert out.getvalue() == ('a = "b"\n# \\x9b31m\\u202e\\u2028\nb = 2\n' if terminal else document)


@given(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=30))
def test_a_command_that_is_shown_names_the_file_that_is_meant(text: str) -> None:
    assert shlex.split(shell_word(text)) == [text]


def test_an_error_is_shown_letter_by_letter() -> None:
    told = UserError(EVIL, [Problem(EVIL, EVIL), Problem("steps", "found [/]")]).text()
    assert told.count("\n") == 2 and "\x1b" not in told and "\r" not in told
    assert "[link=http://evil]" in told


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parts[-1] != "text.py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_everything_is_shown_by_the_one_function(path: Path) -> None:
    """Tables and panels are printed as they are; their cells and titles go through it too."""
    renderables = ("banner(", "summary(", "file_info(", "run_info(", "runs_table(", "facts_table(")
    for call in calls(path):
        name = name_of(call)
        assert name not in ("typer.echo", "typer.secho", "click.echo", "print"), name
        if name.endswith(".print"):
            assert ast.unparse(call.args[0]).startswith(renderables), ast.unparse(call)
        if name.endswith(("add_row", "add_column")):
            assert path.parts[-1] == "text.py"
        if name == "Panel":
            (title,) = [ast.unparse(word.value) for word in call.keywords if word.arg == "title"]
            assert title.startswith("shown(")


@pytest.mark.parametrize("name", ["out [v2]", "out [/v2]", "a b", "it's :smile:", "out\x1b[31m"])
def test_a_run_in_a_folder_of_any_name_says_how_to_go_on(train: Train, tmp_path: Path, name: str) -> None:
    run, text = train({"output": str(tmp_path / name), "steps": 1})
    flat = re.sub(r"\s*│\n│\s*", "", text)
    (line,) = [line for line in flat.splitlines() if "sdtrain fit " in line and "--resume" in line]
    command = line[line.index("sdtrain fit") : line.index(" --resume")]
    if name.isprintable():
        assert Path(shlex.split(command)[2]) == run / "config.toml"
    assert "\x1b" not in text


def test_check_shows_file_names_letter_by_letter(table: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "pictures \x1b[31m[red]"
    folder.mkdir()
    Image.new("RGB", (200, 90)).save(folder / "a\x1b]0;owned\x07 [bold] \udcff.png")
    table["data"]["folder"] = [{"path": str(folder), "missing_captions": "empty"}]
    config = tmp_path / "config.toml"
    config.write_text(config_to_toml(resolve(table, "test")), encoding="utf-8")
    out = io.StringIO()
    check_config(config, [], Console(file=out, force_terminal=True, width=80))
    assert "\x1b]0;owned" not in out.getvalue() and "\x07" not in out.getvalue()
    assert r"a\x1b]0;owned\x07 [bold] \udcff.png" in out.getvalue()


def test_info_shows_what_a_stranger_wrote_letter_by_letter(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    title = EVIL.replace("\udcff", "")
    save_file(
        {"a": torch.zeros(1)}, path, {"modelspec.title": title, "ss_tag_frequency": json.dumps({"x": {title: 3}})}
    )
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=300, color_system=None, legacy_windows=False).print(file_info(path))
    shown = out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert "\x1b" not in shown and "\x07" not in shown
    assert printable(title) in shown


def test_nothing_that_a_run_leaves_holds_the_environment(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "hf_k9Zq7Lw2Xv", "WANDB_API_KEY": "wb-4Tn8Rc1Yp", "SOMETHING_ELSE": "xq-6Mf3Hd0Js"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run, text = train({"steps": 1, "preview.every": 1})
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for content in (text.encode(), *(path.read_bytes() for path in files)):
        assert not any(word.encode() in content for pair in secrets.items() for word in pair)


# ---------------------------------------------------------------------- what is read


@given(st.binary(max_size=200))
@example("größer".encode("utf-16"))
@example(b"\xef\xbb\xbfa cat")
def test_whatever_a_caption_holds_it_is_a_line_or_a_sentence(content: bytes) -> None:
    try:
        text = decode(content)
    except CaptionError:
        return
    for line in (*texts_of(text, "joined"), *texts_of(text, "drawn")):
        assert "\n" not in line and "\0" not in line


@pytest.mark.parametrize("name", ["f.png", "f.txt"])
def test_a_pipe_among_the_pictures_is_refused_and_waits_for_nobody(train: Train, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / ("f.png" if name == "f.txt" else "g.png"))
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="is a device or a pipe"):
        train({"data.folder": [{"path": str(folder), "missing_captions": "empty"}]})
    with pytest.raises(CaptionError):
        read_text(Path("/dev/null"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("*"), inner, max_size=3),
    max_leaves=5,
)
TEXTS = (
    st.text(max_size=20)
    | JSON.map(lambda value: re.sub(r"\\ud[89a-f]..", "", json.dumps(value)))
    | st.sampled_from(["9" * 5000, "[" * 5000, '{"a":' * 500 + "1" + "}" * 500, '{"a":' + "9" * 5000 + "}", EVIL[:-1]])
)
KEYS = st.sampled_from(
    [
        *("ss_steps", "ss_num_train_images", "ss_tag_frequency", "modelspec.title", "modelspec.date", "ss_output_name"),
        *("sdtrain.d", "sdtrain.alpha", "sdtrain.config", "lora_adapter_metadata", "modelspec.resolution"),
        *("ss_bucket_info", "ss_dataset_dirs", "ss_training_started_at", "modelspec.thumbnail", "modelspec.tags"),
        *("modelspec.prediction_type", "ss_v2", "ss_base_model_version", "ss_sd_model_name", "sdtrain.step"),
    ]
)
TABLES = st.dictionaries(KEYS, TEXTS, min_size=1, max_size=4)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a LoRA in both namings."""
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.zeros(2, 64), torch.ones(64, 2)
    plain = "lora_unet_" + layer.replace(".", "_")
    return {
        "sd-scripts": {f"{plain}.lora_down.weight": down, f"{plain}.lora_up.weight": up},
        "diffusers": {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up},
    }


@pytest.mark.parametrize("names", ["sd-scripts", "diffusers"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TABLES)
@example({"ss_steps": "9" * 5000, "ss_num_train_images": "9" * 5000})
@example({"sdtrain.alpha": '{"unet": {"*": [1]}}'})
@example({"lora_adapter_metadata": '{"unet.lora_alpha": "x", "unet.alpha_pattern": [1]}'})
@example({"lora_adapter_metadata": '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}'})
@example({"lora_adapter_metadata": '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(.*.*)*x": 2}}'})
@example({"lora_adapter_metadata": '{"unet.lora_alpha": 1, "unet.alpha_pattern": {".*.*.*.*.*.*x": 2}}'})
@example({"sdtrain.d": '{"unet": "big"}'})
@example({"ss_tag_frequency": '{"x": {"a": "many"}}'})
@example({"ss_bucket_info": '{"buckets": {"0": {"resolution": [1e308, 64], "count": 1}}}'})
@example({"ss_bucket_info": '{"buckets": {"0": {"resolution": [64, 64], "count": null}, "1": 3}}'})
@example({"ss_dataset_dirs": '{"x": {"n_repeats": [], "img_count": 1}}', "ss_training_started_at": "9" * 11})
def test_whatever_metadata_says_the_answer_is_a_description_or_a_sentence(
    tmp_path: Path, loras: dict[str, dict[str, torch.Tensor]], names: str, metadata: dict[str, str]
) -> None:
    from sdtrain.adapters.loading.warm_start import _stored_d
    from sdtrain.files.header import read_header

    path = tmp_path / "x.safetensors"
    save_file(loras[names], path, metadata)
    out = io.StringIO()
    Console(file=out, width=500).print(file_info(path))
    assert "\x1b" not in out.getvalue()
    networks = {"unet": _unet()}
    for read in (lambda: read_lora(path, networks), lambda: _stored_d(path, read_header(path).metadata)):
        try:
            read()
        except UserError as error:
            assert "\x1b" not in error.text()


_KEPT: list[torch.nn.Module] = []


def _unet() -> torch.nn.Module:
    if not _KEPT:
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            config = ROOT / "sdtrain" / "builtin" / "tiny-sdxl" / "unet"
            _KEPT.append(UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config)))
    return _KEPT[0]
