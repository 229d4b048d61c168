"""sdtrain from Python: the same as from the command line, and as light."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sdtrain
from sdtrain.cli import app
from sdtrain.config.from_python import chosen_settings, make_config
from sdtrain.config.presets import preset_values
from sdtrain.config.read import read_config, resolve
from sdtrain.config.schema import Config, DataConfig, FolderConfig, LoraConfig, ModelConfig, OptimizerConfig
from sdtrain.config.write import config_to_toml
from sdtrain.errors import UserError

ROOT = Path(__file__).parent.parent
TINY = ROOT / "sdtrain" / "builtin" / "tiny-sdxl"
Train = Callable[..., tuple[Path, str]]


# ---------------------------------------------------------------------- the names


def test_every_public_name_is_there() -> None:
    for name in sdtrain.__all__:
        assert vars(sdtrain).get(name) or sdtrain.__getattr__(name), name  # type: ignore[attr-defined]
    assert sorted(sdtrain.__all__) == dir(sdtrain)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        sdtrain.fitt  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("line", "heavy"),
    [
        ("import sdtrain", {"torch", "diffusers", "pydantic", "rich", "typer", "PIL", "numpy"}),
        ("from sdtrain import Config, UserError, make_config, read_config", {"torch", "diffusers", "rich", "PIL"}),
        ("from sdtrain import Record, StepRecord, Watcher", {"torch", "diffusers", "pydantic", "rich", "PIL"}),
        ("from sdtrain import FitResult, fit", {"torch", "diffusers", "transformers", "peft"}),
    ],
)
def test_a_name_imports_what_it_needs_and_no_more(line: str, heavy: set[str]) -> None:
    code = f"{line}\nimport sys\nfound = {heavy!r} & set(sys.modules)\nassert not found, found"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_versions_of_what_decides_a_run_are_told_without_importing_it() -> None:
    code = (
        'import sys\nsys.argv = ["sdtrain", "--version"]\nfrom sdtrain.cli import main\n'
        'try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\nassert "torch" not in sys.modules'
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    libraries = ("torch", "diffusers", "transformers", "peft")
    assert result.stdout.splitlines() == [
        f"sdtrain {sdtrain.__version__}",
        f"Python {platform.python_version()}",
        *(f"{name} {importlib.metadata.version(name)}" for name in libraries),
    ]


def test_python_dash_m_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "sdtrain", "--help"], capture_output=True, text=True, check=True)
    for command in app.registered_commands:
        assert command.callback is not None
        assert (command.name or command.callback.__name__) in result.stdout


# ---------------------------------------------------------------------- configs


def config_in_python(table: dict[str, Any], **optimizer: Any) -> Config:
    """The small config, made of the schema's classes."""
    return Config(
        name="small",
        output=table["output"],
        steps=400,
        model=ModelConfig(path="builtin:tiny-sdxl"),
        method=LoraConfig(kind="lora", rank=2),
        data=DataConfig(resolution_px=96, folder=[FolderConfig(path=table["data"]["folder"][0]["path"])]),
        optimizer=OptimizerConfig(**optimizer),
    )


def test_a_config_made_in_python_is_the_one_of_the_file(table: dict[str, Any], tmp_path: Path) -> None:
    made = config_in_python(table, preset="auto-freeze", betas=(0.9, 0.95))
    settings = chosen_settings(made)
    assert "timesteps" not in settings and settings["optimizer"].keys() == {"preset", "betas"}
    resolved = make_config(settings)
    for name, value in preset_values("auto-freeze").items():
        assert getattr(resolved.optimizer, name) == value
    path = tmp_path / "config.toml"
    path.write_text(config_to_toml(resolved), encoding="utf-8")
    assert read_config(path) == resolved
    assert make_config(chosen_settings(resolved)) == resolved, "what is resolved stays as it is"


def test_the_settings_that_are_handed_in_stay_as_they_are(table: dict[str, Any]) -> None:
    before = repr(table)
    assert make_config(table) == resolve(table, "test")
    assert repr(table) == before


def test_a_config_made_in_python_is_checked_as_a_file_is(table: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"config: 1 problem\n.*prodigy_steps.*500 lies beyond steps = 400"):
        sdtrain.fit(config_in_python(table, prodigy_steps=500))
    with pytest.raises(UserError, match="did you mean `rank`"):
        make_config(table | {"method": {"kind": "lora", "rnak": 3}})
    with pytest.raises(UserError, match=r"optimizer\.d0"):
        sdtrain.fit(make_config(table), overrides=["optimizer.d0=-1"])
    with pytest.raises(UserError, match="no such file"):
        sdtrain.fit("nothing.toml")


# ---------------------------------------------------------------------- running


def test_fit_says_where_everything_is_and_shows_nothing(
    table: dict[str, Any], train: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(table)
    result = sdtrain.fit(config, overrides=["steps=2"])
    folder = Path(table["output"]) / "small"
    assert result == sdtrain.FitResult(folder, 2, True, folder / "weights" / "small.safetensors")
    assert result.weights and result.weights.exists()
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    longer = sdtrain.fit(config, resume=True)
    assert (longer.steps, longer.finished) == (4, True)
    assert capfd.readouterr() == ("", "")
    by_command, _ = train({"name": "straight"})
    names = [folder / "weights" / "small.safetensors", by_command / "weights" / "straight.safetensors"]
    ours, theirs = (dict(sdtrain.load_lora(path, tiny_pipeline()).adapters["unet"]) for path in names)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[layer].up, theirs[layer].up) for layer in ours)  # type: ignore[union-attr]


def test_more_steps_keep_the_preset_of_the_run(table: dict[str, Any]) -> None:
    del table["optimizer"]["prodigy_steps"]
    path = Path(table["output"]).parent / "config.toml"
    path.parent.mkdir(exist_ok=True)
    text = config_to_toml(make_config(table | {"optimizer": {"prodigy_steps": 77}, "steps": 400}))
    path.write_text(text.replace("prodigy_steps = 77\n", ""), encoding="utf-8")
    assert sdtrain.fit(path, overrides=["steps=4"]).finished
    assert sdtrain.fit(path, overrides=["steps=5"], resume=True).steps == 5
    assert read_config(Path(table["output"]) / "small" / "config.toml").optimizer.prodigy_steps == "auto"


def test_samples_are_those_of_the_command_and_nothing_is_written(train: Train, tmp_path: Path) -> None:
    from rich.console import Console

    from sdtrain.commands.sample import sample_to_files

    run, _ = train({"steps": 2})
    before = sorted(run.rglob("*"))
    rows = sdtrain.sample(run, ["a red circle", "a cat"], seeds=[3, 4])
    assert [[picture.size for picture in row] for row in rows] == [[(96, 96)] * 2] * 2
    assert sorted(run.rglob("*")) == before
    sample_to_files(run, ["a red circle", "a cat"], [3, 4], tmp_path / "out", [], Console(quiet=True))
    for index, row in enumerate(rows):
        for seed, picture in zip((3, 4), row, strict=True):
            with Image.open(tmp_path / "out" / f"prompt-{index:02d}-seed-{seed}.png") as written:
                assert written.tobytes() == picture.tobytes()
    one = sdtrain.sample(str(run), "a red circle", seeds=[3], overrides=["preview.num_inference_steps=1"])
    assert len(one) == 1 and one[0][0].tobytes() != rows[0][0].tobytes()


def tiny_pipeline() -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = pipe("a red circle", num_inference_steps=2, generator=generator, output_type="pt", height=64, width=64)
    images = found.images
    assert isinstance(images, torch.Tensor)
    return images


def test_a_merged_lora_draws_what_diffusers_draws_with_it(train: Train) -> None:
    run, _ = train({"optimizer.d0": 1e-2, "method.train": ["unet", "text_encoder", "text_encoder_2"]})
    file = run / "weights" / "small.safetensors"
    pipe = tiny_pipeline()
    before = picture(pipe)
    read = sdtrain.load_lora(file, pipe)
    assert torch.equal(picture(pipe), before), "reading changes nothing"
    assert sdtrain.merge_lora(str(file), pipe) == sum(map(len, read.adapters.values()))
    assert (picture(pipe) - before).abs().max() > 1e-3
    theirs = tiny_pipeline()
    theirs.load_lora_weights(run / "weights", weight_name=file.name)
    assert torch.allclose(picture(pipe), picture(theirs), atol=1e-4)
    networks = {name: tiny_pipeline().components[name] for name in ("unet", "text_encoder", "text_encoder_2")}
    assert sdtrain.merge_lora(file, networks, weight=0.5) > 0
    networks.pop("text_encoder")
    with pytest.raises(UserError, match=r"small\.safetensors"):
        sdtrain.merge_lora(file, networks)


def test_the_lines_in_the_readme_run(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    config = tmp_path / "config.toml"
    config.write_text(config_to_toml(make_config(table)), encoding="utf-8")
    replaced = {"configs/quickstart.toml": str(config), "steps=200": "steps=2", "sdtrain/builtin/tiny-sdxl": str(TINY)}
    for old, new in replaced.items():
        assert code.count(old) == 1, f"{old} stands no more in the README: change this test with it"
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 ")
    assert (tmp_path / "zorbit.png").exists()
