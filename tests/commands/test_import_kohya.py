"""`sdtrain import-kohya` as a person meets it, and what `sdtrain check` says of a file of kohya."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.commands.import_kohya import import_kohya, num_pictures
from sdtrain.config.foreign_settings import FOREIGN, SECTIONS
from sdtrain.config.read import read_config, read_draft
from sdtrain.errors import UserError

TRAINING = """
[model]
pretrained_model_name_or_path = "builtin:tiny-sdxl"
[additional_network_arguments]
network_module = "networks.lora"
network_dim = 4
network_alpha = 2
[training_arguments]
max_train_epochs = 3
train_batch_size = 2
resolution = "64,64"
learning_rate = 1e-4
"""


@pytest.fixture
def training(tmp_path: Path) -> Path:
    path = tmp_path / "their.toml"
    path.write_text(TRAINING, encoding="utf-8")
    return path


def test_without_out_the_config_is_printed_and_nothing_is_written(training: Path) -> None:
    result = CliRunner().invoke(app, ["import-kohya", str(training)])
    assert result.exit_code == 0, result.output
    assert tomllib.loads(result.stdout)["method"]["rank"] == 4
    assert "no counterpart" not in result.stdout.splitlines()[-1]
    assert [path.name for path in training.parent.iterdir()] == ["their.toml"]


def test_what_is_printed_is_what_is_written(training: Path, tmp_path: Path) -> None:
    training.write_text(TRAINING + 'train_data_dir = "a\\u2028b\\u0085c"\n', encoding="utf-8")
    printed = CliRunner().invoke(app, ["import-kohya", str(training)])
    CliRunner().invoke(app, ["import-kohya", str(training), "--out", str(tmp_path / "ours.toml")])
    assert printed.stdout == (tmp_path / "ours.toml").read_text(encoding="utf-8")


def test_what_is_written_passes_check(training: Path, pictures: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(
        f"[general]\nenable_bucket = true\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 64\nbatch_size = 2\n"
        f'[[datasets.subsets]]\nimage_dir = "{pictures}"\nnum_repeats = 2\n',
        encoding="utf-8",
    )
    out = tmp_path / "ours.toml"
    result = CliRunner().invoke(app, ["import-kohya", str(training), str(dataset), "--out", str(out)])
    assert result.exit_code == 0, result.output
    config = read_config(out)
    assert config.steps == 3 * 6  # 6 pictures, 2 repeats, 2 in a batch
    checked = CliRunner().invoke(app, ["check", str(out)])
    assert checked.exit_code == 0, checked.output
    assert "12 an epoch of 6" in checked.output


def test_a_dataset_config_that_is_named_is_read_too(training: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset.toml"
    dataset.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "there"\n', encoding="utf-8")
    training.write_text(TRAINING + f'dataset_config = "{dataset}"\n', encoding="utf-8")
    assert [one["path"] for one in tomllib.loads(import_kohya([training], None).text)["data"]["folder"]] == ["there"]


def test_nothing_is_ever_written_over(training: Path) -> None:
    for out in (training, training.parent):
        with pytest.raises(UserError, match="is there already"):
            import_kohya([training], out)
    assert training.read_text(encoding="utf-8") == TRAINING


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("gone.toml", None, "No such file"),
        ("a.toml", "x = ", "not TOML"),
        ("a.json", '{"a": }', "not JSON"),
        ("a.json", "[]", "holds no options"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, name: str, content: str | None, what: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=what):
        import_kohya([tmp_path / name], None)


def test_halves_of_characters_can_be_written(tmp_path: Path) -> None:
    source, out = tmp_path / "their.json", tmp_path / "ours.toml"
    source.write_text(r'{"output_dir": "a\ud800b", "\ud800": 1, "network_args": ["\udfff=1"]}', encoding="utf-8")
    import_kohya([source], out)
    assert read_config(out).output == "a?b"


def test_pictures_are_counted_as_they_are_read(pictures: Path, tmp_path: Path) -> None:
    assert num_pictures(str(pictures)) == 6
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "1.png").touch()
    assert num_pictures(str(tmp_path)) == 0
    assert num_pictures(str(tmp_path / "gone")) is None
    assert num_pictures("\0") is None


def test_importing_never_imports_torch(training: Path) -> None:
    code = f"""
import sys
sys.argv = ["sdtrain", "import-kohya", {str(training)!r}]
from sdtrain.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert not {{"torch", "diffusers", "transformers", "peft"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_check_answers_every_option_of_a_file_of_kohya_in_one_round(tmp_path: Path) -> None:
    names = sorted(set(FOREIGN) - {"seed", "vae"})
    lines = ["seed = 3", "[Any_section]", *(f"{name} = 1" for name in names), "[general]", "flip_aug = true", "zzz = 1"]
    lines += ["[[datasets]]", "resolution = 512", "[[datasets.subsets]]", "image_dir = 'x'", "num_repeats = 10"]
    path = tmp_path / "kohya.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    told = {problem.where: problem.what for problem in read_draft(path).problems}
    for name in names:
        assert told[f"Any_section.{name}"], name
        assert told[f"Any_section.{name}"] != "unknown setting", name
    assert told["datasets[0].subsets[0].num_repeats"] == FOREIGN["num_repeats"].sentence()
    assert "import-kohya" in told["general"]
    assert told["general.zzz"] == "unknown setting"
    assert {"datasets", "Any_section"} <= set(told)
    assert "subsets" in SECTIONS


def test_a_misspelt_option_of_kohya_is_answered_as_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "kohya.toml"
    path.write_text("[Save]\noutput_name = 'x'\nsave_evry_n_steps = 5\n", encoding="utf-8")
    told = {problem.where: problem.what for problem in read_draft(path).problems}
    assert "`checkpoint.every`" in told["Save.save_evry_n_steps"]


def test_our_own_sections_misspelt_are_still_ours(tmp_path: Path) -> None:
    path = tmp_path / "ours.toml"
    path.write_text("name = 'x'\n[modl]\npath = 'x'\n[dta]\nbatch_size = 2\n", encoding="utf-8")
    told = {problem.where: problem.what for problem in read_draft(path).problems}
    assert told["modl"] == "unknown setting; did you mean `model`?"
    assert told["dta"] == "unknown setting; did you mean `data`?"


def test_json_given_to_check_is_told_of_the_import(tmp_path: Path) -> None:
    path = tmp_path / "kohya.json"
    path.write_text('{"LoRA_type": "Standard"}', encoding="utf-8")
    with pytest.raises(UserError, match="sdtrain import-kohya"):
        read_config(path)


def test_a_word_where_a_section_stands_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "kohya.toml"
    path.write_text("optimizer = 'Prodigy'\n", encoding="utf-8")
    told = {problem.where: problem.what for problem in read_draft(path).problems}
    assert told["optimizer"] == "found 'Prodigy', where a section stands: [optimizer]"
