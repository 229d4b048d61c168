"""What `sdtrain export` writes in a form, a type and a strength, and what a run writes of its weights along the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.kinds import delta
from sdtrain.adapters.layers import plain_modules
from sdtrain.cli import app
from sdtrain.commands.files.merge import read_base
from sdtrain.errors import UserError
from sdtrain.models.model import Model
from sdtrain.training.weights_files import NATIVE

Train = Callable[..., tuple[Path, str]]


@pytest.fixture(scope="module")
def base() -> Model:
    return read_base("builtin:tiny-sdxl")[0]


def sdtrain(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def changes(base: Model, path: Path) -> dict[str, Tensor]:
    layers = dict(plain_modules(base.networks["unet"]))
    read = read_lora(path, base.networks).adapters["unet"]
    return {name: delta(weights, layers[name].weight.detach()) for name, weights in read.items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float = 1e-3) -> None:
    assert found.keys() == wanted.keys()
    lost = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    assert lost <= share**2 * sum(float(change.square().sum()) for change in wanted.values())


@pytest.mark.parametrize("adapter", ["lora", "loha", "lokr", "dora"])
def test_a_strength_scales_what_is_written_in_every_form(
    train: Train, base: Model, tmp_path: Path, adapter: str
) -> None:
    run, _ = train(
        {"steps": 2, "method.adapter": adapter, "method.rank": 4, "optimizer.d0": 1e-2, "checkpoint.every": 2}
        | {"export.rank": 1000, "export.energy": 1.0}  # nothing is cut, so that only the strength shows
    )
    ending = NATIVE if adapter == "dora" else ""
    wanted = changes(base, run / "weights" / f"small{ending}.safetensors")
    half = {name: 0.5 * change for name, change in wanted.items()}
    for form in ("native", "lora", "diff"):
        out = tmp_path / f"{form}.safetensors"
        command = ["export", run, "--format", "sd-scripts", "--form", form, "--strength", 0.5, "--out", out]
        if (adapter, form) == ("dora", "native"):
            with pytest.raises(UserError, match="dora has no factor that scales it: add --form lora"):
                sdtrain(*command)
            assert not out.exists()
            continue
        sdtrain(*command)
        assert_equal(changes(base, out), half)


def test_a_file_is_replaced_only_when_asked_and_the_type_is_chosen(train: Train, tmp_path: Path) -> None:
    run, _ = train({"steps": 1, "checkpoint.every": 1, "optimizer.d0": 1e-2})
    out = tmp_path / "a.safetensors"
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already; add --force"):
        sdtrain("export", run, "--format", "sd-scripts", "--out", out)
    assert out.read_text() == "mine"
    sdtrain("export", run, "--format", "sd-scripts", "--dtype", "float16", "--force", "--out", out)
    assert {tensor.dtype for name, tensor in load_file(out).items() if "lora" in name.split(".")[1]} == {torch.float16}
    with pytest.raises(UserError, match="is a folder"):
        sdtrain("export", run, "--format", "sd-scripts", "--force", "--out", tmp_path)
    for strength in ("0", "nan", "inf"):
        with pytest.raises(UserError, match="is no strength"):
            sdtrain("export", run, "--format", "sd-scripts", "--strength", strength)


@pytest.mark.parametrize("kind", ["single-file", "folder"])
def test_a_whole_model_has_no_form(train: Train, tmp_path: Path, kind: str) -> None:
    run, _ = train({"steps": 1})
    out = tmp_path / ("out" if kind == "folder" else "out.safetensors")
    done = CliRunner().invoke(app, ["export", str(run), "--format", kind, "--form", "diff", "--out", str(out)])
    assert isinstance(done.exception, UserError) and not out.exists()
    assert "diff is a form of adapter files, and a whole model has none" in str(done.exception)


def test_an_exported_oft_loads_everywhere_or_says_what_it_misses(train: Train, base: Model, tmp_path: Path) -> None:
    changed = {"steps": 2, "method.adapter": "oft", "method.rank": 4, "optimizer.d0": 1e-2, "checkpoint.every": 2}
    run, _ = train(changed | {"export.rank": 2})
    out = tmp_path / "a.safetensors"
    said = sdtrain("export", run, "--format", "sd-scripts", "--out", out)
    assert "is a LoRA that misses" in said
    exact = changes(base, run / "weights" / f"small{NATIVE}.safetensors")
    assert changes(base, out).keys() == exact.keys()
    with pytest.raises(UserError, match="oft has no words in sd-scripts names"):
        sdtrain("export", run, "--format", "sd-scripts", "--form", "native", "--out", tmp_path / "b.safetensors")


def test_weights_along_the_way_are_the_averages_of_their_steps_and_change_nothing(train: Train, tmp_path: Path) -> None:
    states = {"steps": 4, "checkpoint.every": 1, "checkpoint.keep": 9, "optimizer.d0": 1e-2}
    run, _ = train(states | {"export.every": 1, "export.keep": 2})
    weights = run / "weights"
    assert sorted(path.name for path in weights.iterdir()) == [
        "small-step-000002.safetensors",
        "small-step-000003.safetensors",
        "small.safetensors",
    ]
    for step in (2, 3):
        out = tmp_path / f"{step}.safetensors"
        sdtrain("export", run, "--format", "sd-scripts", "--step", step, "--out", out)
        found, wanted = load_file(weights / f"small-step-{step:06d}.safetensors"), load_file(out)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    without, _ = train(states | {"name": "without"})
    last, other = load_file(weights / "small.safetensors"), load_file(without / "weights" / "without.safetensors")
    assert all(torch.equal(last[name], other[name]) for name in last)
