"""Adapters on a packed base: near the unpacked one in what they learn, the same in every law, and written for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.kinds import delta
from sdtrain.adapters.quantised import packages
from sdtrain.adapters.quantised.layer import QuantisedLinear
from sdtrain.commands.files.export import export_run
from sdtrain.config.read import resolve
from sdtrain.config.schema import BasePrecision, Config
from sdtrain.data.examples import scan_folders
from sdtrain.errors import UserError
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.models.checkpoints.single_file import weights_of
from sdtrain.models.model import Model
from sdtrain.training.computing.objective import Objective
from sdtrain.training.parameters import train_parameters
from sdtrain.training.prepare import load, load_as_it_is, make_batches
from sdtrain.training.run import open_run
from tests.conftest import merged

Train = Callable[..., tuple[Path, str]]
SMALL = {"data.resolution_px": 64, "data.batch_size": 1}
LEARNING = {
    "method.targets": "attention+ff",
    "steps": 10,
    "data.folder": [{"path": "builtin:quickstart"}],
    "data.resolution_px": 64,
    "data.bucket_step_px": 64,
    "data.batch_size": 8,
    "optimizer.d0": 1e-4,
}
NEAR = {"int8": 0.999, "fp8": 0.995, "nf4": 0.99}
"""1 - cos is about twice to six times the square of what rounding changes of a weight: 0.6 % and 2.6 % of it in 8 bits,
9.2 % in 4. With the layers that nf4 keeps in 8 bits in 4, too, it is 0.023 for a LoRA."""


def bits(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def files(run: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted((run / "weights").glob("*.safetensors"))}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


def model_of(config: Config, *, as_it_is: bool = False) -> Model:
    opened, run = open_model(config.model, "model"), open_run(config)
    return load_as_it_is(run, opened) if as_it_is else load(run, opened)


def gradients(config: Config, state: dict[str, Tensor]) -> Tensor:
    """The gradients of all adapters one after another, over four batches, of adapters as a state has them."""
    run, model = open_run(config), model_of(config)
    trainable = train_parameters(model, run)
    parameters = trainable.named_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    examples, _ = scan_folders(config.data, decode=False)
    batches = make_batches(model, run, examples, Console(quiet=True))
    objective = Objective(model, config, run.device)
    for step in range(4):
        for batch, share in batches.at(step, 8, hand=0, hands=1):
            (share * objective(batch, lambda _, step=step: run.generator("noise", step))).backward()
    batches.close()
    return torch.cat([parameter.grad.flatten() for parameter in parameters.values() if parameter.grad is not None])


@pytest.mark.parametrize(
    "adapter",
    ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dora", "oft", "loha", "lokr"))],
)
def test_the_gradients_on_a_packed_base_are_nearly_those_on_the_unpacked_one(
    train: Train, table: dict[str, Any], adapter: str
) -> None:
    changes = LEARNING | {"method.adapter": adapter, "method.rank": 8 if adapter == "oft" else 4}
    run, _ = train(changes)  # up matrices of fresh adapters are zero, and so are the gradients of the down ones
    state = load_file(run / "checkpoints" / "step-000010" / "parameters.safetensors")
    config = resolve(merged(table, changes), "test")
    wanted = gradients(config, state)
    for precision, least in NEAR.items():
        model = config.model.model_copy(update={"base_precision": precision})
        found = gradients(config.model_copy(update={"model": model}), state)
        cosine = float(torch.cosine_similarity(wanted, found, dim=0))
        print(f"{adapter} {precision}: cos = {cosine:.5f}")
        assert least < cosine < 1, precision


@pytest.mark.parametrize(
    "changes",
    [
        {"model.base_precision": "int8"},
        pytest.param({"model.base_precision": "nf4", "method.adapter": "dora"}, marks=pytest.mark.slow),
        pytest.param(
            {"model.base_precision": "fp8", "model.dtype": "bfloat16", "memory.gradient_checkpointing": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["int8", "dora nf4", "bfloat16 fp8"],
)
def test_a_run_on_a_packed_base_resumes_bit_for_bit_with_and_without_looking(
    train: Train, changes: dict[str, Any]
) -> None:
    changes = changes | {"validation.share": 0.34, "validation.every": 0}
    straight, _ = train(SMALL | changes | {"name": "straight", "steps": 3})
    looks = {"preview.every": 1, "validation.every": 1}
    train(SMALL | changes | looks | {"name": "again", "steps": 2})
    again, _ = train(SMALL | changes | looks | {"name": "again", "steps": 3}, resume=True)
    assert bits(straight, 3) == bits(again, 3)
    assert losses(straight) == losses(again)
    assert len(list((again / "previews").glob("step-*.png"))) == 4
    assert '"validation"' in (again / "log.jsonl").read_text() or '"held' in (again / "log.jsonl").read_text()


def test_a_packed_base_is_trained_on(train: Train) -> None:
    runs = {one: losses(train(SMALL | {"name": one, "steps": 2, "model.base_precision": one})[0]) for one in NEAR}
    whole = losses(train(SMALL | {"name": "whole", "steps": 2})[0])
    first = {tuple(found[:1]) for found in (*runs.values(), whole)}
    assert len(first) == 4, "each rounds the base in its own way"
    for found in runs.values():
        assert found == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize("adapter", ["dora", "oft"])
def test_what_is_written_is_the_change_of_the_unpacked_base(train: Train, table: dict[str, Any], adapter: str) -> None:
    changes = SMALL | {"method.adapter": adapter, "method.rank": 8, "model.base_precision": "nf4", "steps": 6}
    changes |= {"export.form": "diff", "optimizer.d0": 1e-2}
    run, _ = train(changes)
    native, main = sorted((run / "weights").glob("*.safetensors"), key=lambda path: "-native" not in path.name)
    base = model_of(resolve(merged(table, changes), "test"), as_it_is=True)
    packed = model_of(resolve(merged(table, changes), "test"))
    trained, written = (read_lora(path, base.networks).adapters["unet"] for path in (native, main))
    apart = 0.0
    for name, weights in trained.items():
        original, near = base.networks["unet"].get_submodule(name).weight, packed.networks["unet"].get_submodule(name)
        assert isinstance(original, Tensor) and isinstance(near, QuantisedLinear)
        wanted = delta(weights, original)
        assert torch.equal(delta(written[name], original), wanted), name
        apart = max(apart, float((delta(weights, near.weight) - wanted).norm() / wanted.norm()))
    assert apart > 0.01, "on the packed base it would have been another change"


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_whole_checkpoint_is_the_unpacked_base_and_its_change(
    train: Train, table: dict[str, Any], tmp_path: Path, adapter: str
) -> None:
    changes = SMALL | {"model.base_precision": "int8", "steps": 3, "method.adapter": adapter}
    run, _ = train(changes)
    config = resolve(merged(table, changes), "test")
    written = export_run(run, "folder", None, tmp_path / "whole").path
    found = model_of(resolve(merged(table, {"model.path": str(written)}), "test"), as_it_is=True).networks["unet"]
    base = model_of(config, as_it_is=True)
    native = next(path for path in sorted((run / "weights").glob("*.safetensors"), reverse=True))
    native = run / "weights" / ("small-native.safetensors" if adapter == "dora" else native.name)
    adapters = read_lora(native, base.networks).adapters["unet"]
    for name, weight in weights_of(base.networks["unet"]).items():
        change = adapters.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        wanted = weight if change is None else weight.float() + delta(change, weight)
        assert torch.equal(dict(found.named_parameters())[name], wanted.half().float()), name  # as the base is stored


def test_a_run_may_go_on_with_another_precision(train: Train) -> None:
    train(SMALL | {"steps": 1})
    run, _ = train(SMALL | {"steps": 2, "model.base_precision": "int8"}, resume=True)
    assert len(losses(run)) == 2


@pytest.mark.parametrize("precision", ["int8", "fp8", "nf4"])
def test_an_absent_package_is_told_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, precision: BasePrecision
) -> None:
    (*_, package) = packages.PACKAGES[precision]
    assert packages.package_problems(precision) == [] == packages.package_problems("full")
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == package else find_spec(name))
    (problem,) = packages.package_problems(precision)
    assert problem.where == "model.base_precision"
    assert f"pip install {package}" in problem.what and 'use "full"' in problem.what


def test_all_absent_packages_of_a_precision_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    (problem,) = packages.package_problems("nf4")
    assert "the packages bitsandbytes and torchao, which are not installed; `pip install bitsandbytes torchao`" in (
        problem.what
    )


def test_an_absent_package_is_told_before_a_model_is_loaded(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    monkeypatch.setattr("sdtrain.training.fit.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="needs the package torchao, which is not installed"):
        train({"model.base_precision": "int8"})


def test_a_full_fine_tune_has_no_packed_base(table: dict[str, Any]) -> None:
    changes = {"method": {"kind": "full"}, "model.base_precision": "int8"}
    with pytest.raises(UserError, match=r"model\.base_precision  int8, but a full fine-tune changes the base"):
        resolve(merged(table, changes), "test")


def test_a_base_that_is_gone_is_told_where_it_is_needed(table: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    from sdtrain.files.locations import BUILTIN_FOLDER

    folder = shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl", tmp_path / "model")
    config = resolve(merged(table, {"model.path": str(folder), "model.base_precision": "int8"}), "test")
    layer = next(each for each in model_of(config).networks["unet"].modules() if isinstance(each, QuantisedLinear))
    assert layer.original().shape == layer.weight.shape
    weights = next((folder / "unet").glob("*.safetensors"))
    shutil.copyfile(folder / "vae" / "diffusion_pytorch_model.safetensors", weights)
    with pytest.raises(UserError, match="put the model's file back"):
        layer.original()
    weights.unlink()
    with pytest.raises(UserError):
        layer.original()
