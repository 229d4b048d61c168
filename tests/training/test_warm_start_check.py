"""Whether a run can start from a file is told from headers, before a model is loaded, and in one round."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtrain.adapters.attach import AdapterSettings, adapter_weights, attach_adapters
from sdtrain.adapters.formats.layer_names import diffusers_names, sd_scripts_names
from sdtrain.adapters.formats.lora_file import write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.layers import plain_modules
from sdtrain.adapters.targets import select_modules
from sdtrain.config.read import overridden
from sdtrain.config.schema import ModelConfig
from sdtrain.errors import UserError
from sdtrain.families.modelspec import Description
from sdtrain.families.original_names import own_unet_names
from sdtrain.files.header import read_header
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.training.start import draft_run, inspect_run
from sdtrain.training.warm_start_check import Layers, unet_layers
from tests.conftest import one_in

BASE = "builtin:tiny-sdxl"
BUILTIN = Path(__file__).parents[2] / "sdtrain" / "builtin" / "tiny-sdxl"
Problems = Callable[[dict[str, Any]], list[tuple[str, str]]]


@cache
def layers() -> dict[str, tuple[int, ...]]:
    return shapes_by_name(unet_layers(open_model(ModelConfig(path=BASE), BASE)))


def shapes_by_name(found: Layers) -> dict[str, tuple[int, ...]]:
    """The shapes by all the names that files may have."""
    return {name: found.shapes[layer] for name, layer in found.own_names.items()}


def lora(path: Path, rank: int = 2, names: str = "lora_unet_", wrong_width: int = 0, **more: Tensor) -> Path:
    """A LoRA on the attention layers of the embedded model."""
    tensors = dict(more)
    for name, shape in layers().items():
        if name.startswith(names) and name.endswith("attn2_to_k" if "_" in names else "attn2.to_k"):
            down, up = ("lora_down", "lora_up") if "_" in names else ("lora_A", "lora_B")
            tensors[f"{name}.{down}.weight"] = torch.zeros(rank, wrong_width or shape[1])
            tensors[f"{name}.{up}.weight"] = torch.zeros(shape[0], rank)
    assert len(tensors) > len(more)
    save_file(tensors, path)
    return path


@pytest.fixture
def problems(table: dict[str, Any], tmp_path: Path) -> Callable[..., list[str]]:
    def look(file: Path, **method: object) -> list[str]:
        table["method"] |= {"init_from": str(file), "targets": ["*.attn2.to_k"], **method}
        try:
            inspect_run(draft_run(overridden(table, "config.toml", ()), resume=False), decode=False)
        except UserError as error:
            assert {problem.where for problem in error.problems} == {"method.init_from"}, error
            return [problem.what for problem in error.problems]
        return []

    return look


@pytest.mark.parametrize("names", ["lora_unet_", "unet."])
def test_a_file_that_fits_has_no_problems(problems: Problems, tmp_path: Path, names: str) -> None:
    assert problems(lora(tmp_path / "a.safetensors", names=names)) == []


def test_kind_networks_rank_and_model_are_told_before_loading(problems: Problems, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 4)}
    nowhere = "lora_unet_nothing_here"
    strange = {f"{nowhere}.lora_down.weight": torch.zeros(2, 4), f"{nowhere}.lora_up.weight": torch.zeros(4, 2)}
    half = {f"{nowhere}.lora_down.weight": torch.zeros(2, 4)}
    assert "no adapters known here" in problems(_saved(path, {"a": torch.zeros(2)}))[0]
    assert (
        'holds lora adapters, but method.adapter = dora: set method.adapter = "lora"'
        in problems(lora(path), adapter="dora")[0]
    )
    assert "has rank 3, but method.rank = 2: set method.rank = 3" in problems(lora(path, 3), adapter="lora")[0]
    assert "has adapters for text_encoder, too" in problems(lora(path, **text))[0]
    assert "no adapters for text_encoder_2" in problems(lora(path), train=["unet", "text_encoder_2"])[0]
    assert "has 7 inputs, this one's" in problems(lora(path, wrong_width=7), train=["unet"])[0]
    assert "its lora_unet_nothing_here is no layer of this one" in problems(lora(path, **strange))[0]
    assert "lora_unet_nothing_here lacks its up matrix; choose a whole file" in problems(lora(path, **half))[0]


def test_the_native_file_is_named_where_it_lies_beside(problems: Problems, tmp_path: Path) -> None:
    lora(tmp_path / "a-native.safetensors")
    assert "name a-native.safetensors beside it" in problems(lora(tmp_path / "a.safetensors"), adapter="dora")[0]


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing"])
def test_what_is_no_file_is_told_and_never_waited_for(problems: Problems, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    said = {"pipe": "a device or a pipe", "folder": "is a folder", "missing": "no such file"}
    assert said[kind] in problems(path)[0]


def _saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def test_the_layers_that_headers_tell_are_those_of_the_network(tmp_path: Path) -> None:
    from sdtrain.commands.files.merge import read_base

    model, size = read_base(BASE)
    unet = {"unet": model.networks["unet"]}
    shapes = {
        name: tuple(module.weight.shape) for name, module in plain_modules(unet["unet"]) if hasattr(module, "weight")
    }
    by_name = sd_scripts_names(model.networks)["unet"]
    wanted = {by_name[module]: shapes[module] for module in by_name}
    also = {name: shapes[module] for module, name in diffusers_names(unet)["unet"].items()}
    assert (wanted | also).items() <= layers().items()
    model.write_checkpoint(tmp_path / "whole.safetensors", Description("test", size), layout="single-file")
    opened = open_model(ModelConfig(path=str(tmp_path / "whole.safetensors"), components=str(BUILTIN)), "test")
    single = unet_layers(opened)
    assert single.own_names == unet_layers(open_model(ModelConfig(path=BASE), BASE)).own_names
    found = {name: shape[:2] for name, shape in shapes_by_name(single).items()}
    assert {name: shape[:2] for name, shape in (wanted | also).items()}.items() <= found.items()


def test_a_base_in_eight_bits_is_refused_by_check(table: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "fp8"
    shutil.copytree(BUILTIN, folder)
    [file] = (folder / "unet").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("to_q.weight"))
    file.unlink()
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    table["model"]["path"] = str(folder)
    with pytest.raises(UserError, match="F8_E4M3, which cannot be trained; get fp16 or more"):
        inspect_run(draft_run(overridden(table, "config.toml", ()), resume=False), decode=False)


@pytest.mark.parametrize("how", ["a VAE of its own", "scales beside", "whole numbers"])
def test_whatever_is_packed_is_told_at_its_setting(table: dict[str, Any], tmp_path: Path, how: str) -> None:
    from sdtrain.commands.files.merge import read_base

    path = tmp_path / "model.safetensors"
    read_base(BASE)[0].write_checkpoint(path, Description("test", (128, 128)), layout="single-file")
    tensors, metadata = load_file(path), read_header(path).metadata
    key = "model.diffusion_model.out.2.weight"
    match how:
        case "a VAE of its own":
            key = "first_stage_model.decoder.conv_in.weight"
            tensors[key] = tensors[key].to(torch.float8_e5m2)
            table["model"]["vae"] = str(path)
            where, said = "model.vae", f"model.safetensors: {key} is stored as F8_E5M2"
        case "scales beside":
            tensors["model.diffusion_model.out.2.scale_weight"] = torch.ones(())
            where, said = "model.path", "out.2.scale_weight belongs to weights that are packed"
        case _:
            tensors[key] = tensors[key].to(torch.int32)
            where, said = "model.path", f"{key} is stored as I32, which cannot be trained; get fp16 or more"
    save_file(tensors, path, metadata)
    if where == "model.path":
        table["model"] |= {"path": str(path), "components": str(BUILTIN)}
    with pytest.raises(UserError) as caught:
        inspect_run(draft_run(overridden(table, "config.toml", ()), resume=False), decode=False)
    [problem] = caught.value.problems
    assert problem.where == where and said in problem.what


def test_oft_on_convolutions_is_a_mistake_in_the_settings(table: dict[str, Any]) -> None:
    table["method"] |= {"adapter": "oft", "targets": "all"}
    with pytest.raises(UserError, match='oft cannot rotate; use "all-linear"'):
        inspect_run(draft_run(overridden(table, "config.toml", ()), resume=False), decode=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The embedded model as a folder and as one file in the original layout."""
    from sdtrain.commands.files.merge import read_base

    path = tmp_path_factory.mktemp("bases") / "whole.safetensors"
    model, size = read_base(BASE)
    model.write_checkpoint(path, Description("test", size), layout="single-file")
    return {"folder": {"path": BASE}, "file": {"path": str(path), "components": str(BUILTIN)}}


@pytest.mark.parametrize("base", ["folder", "file"])
@pytest.mark.parametrize("names", ["sd-scripts", "diffusers"])
@pytest.mark.parametrize("kind", one_in(2, ["lora", "dora", "lokr", "loha", "oft"]))
@pytest.mark.parametrize("targets", ["attention+ff", "all"])
def test_what_a_run_writes_a_run_of_the_same_targets_starts_from(
    problems: Problems,
    table: dict[str, Any],
    tmp_path: Path,
    bases: Any,
    kind: str,
    names: str,
    base: str,
    targets: str,
) -> None:
    """And one of other targets says which layers differ, before anything is loaded."""
    if kind == "oft" and (names == "sd-scripts" or targets == "all"):
        pytest.skip("no such file is written")
    path = tmp_path / "a.safetensors"
    write_adapters(path, kind, names, targets)
    table["model"] = bases[base]
    how = {"adapter": kind, "rank": 4, "alpha": 4.0, "train": ["unet"]}
    assert problems(path, targets=targets, **how) == []
    [less] = problems(path, targets="attention", **how)
    assert "a.safetensors has " in less and "which this run does not train: widen method.targets" in less
    if targets != "all" and kind != "oft":
        [more] = problems(path, targets="all", **how)
        assert "a.safetensors lacks add_embedding.linear_1 (and " in more and "narrow method.targets" in more
    if kind != "oft":
        weights = {"layer_weights": {"up_blocks.*": 0.0}}
        [other] = problems(path, targets=targets, **how, **weights)
        assert "has up_blocks.0." in other


@pytest.mark.parametrize("base", ["folder", "file"])
@pytest.mark.parametrize("kind", one_in(2, ["lora", "dora", "lokr", "loha", "oft"]))
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "layer", ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"]
)
def test_a_layer_twice_as_large_is_told_of_every_kind(
    problems: Problems, table: dict[str, Any], tmp_path: Path, bases: Any, kind: str, base: str, side: int, layer: str
) -> None:
    """Once for its outputs, once for its inputs: one part that has this side grows."""
    if kind == "oft" and (side == 0 or "conv" in layer):
        pytest.skip("turns the inputs of linear layers")
    path = tmp_path / "a.safetensors"
    targets = "all-linear" if kind == "oft" else "all"
    write_adapters(path, kind, "diffusers", targets)
    tensors, metadata = load_file(path), read_header(path).metadata
    ends = {
        "lora": ["lora_B.weight", "lora_A.weight"],
        "loha": ["hada_w1_a", "hada_w1_b"],
        "lokr": ["lokr_w1", "lokr_w1"],
        "oft": ["oft_R.weight", "oft_R.weight"],
    }
    part = ends["lora" if kind == "dora" else kind][side]
    [key] = [key for key in tensors if key == f"unet.{layer}.{part}"]
    tensors[key] = torch.cat([tensors[key]] * 2, 0 if kind == "oft" else side)
    if kind == "dora" and side == 0:
        [key] = [key for key in tensors if key.startswith(f"unet.{layer}.") and "magnitude" in key]
        tensors[key] = torch.cat([tensors[key]] * 2)
    save_file(tensors, path, metadata)
    table["model"] = bases[base]
    said = problems(path, targets=targets, adapter=kind, rank=4, alpha=4.0, train=["unet"])
    assert len(said) == 1 and f"was made for another model: its unet.{layer} has " in said[0], said


@pytest.mark.parametrize("base", ["folder", "file"])
def test_the_first_names_of_diffusers_are_those_of_its_layers(
    problems: Problems, table: dict[str, Any], tmp_path: Path, bases: Any, base: str
) -> None:
    """`attn1.processor.to_out_lora.down`, in which layer and part are one word: what loading accepts, check does."""
    path = tmp_path / "a.safetensors"
    write_adapters(path, "lora", "diffusers", "attention")
    first = {}
    for key, tensor in load_file(path).items():
        layer, part = key.split(".lora_")
        block, name = layer.replace("to_out.0", "to_out").rsplit(".", 1)
        word = {"A": "down", "B": "up"}[part[0]]
        first[f"{block}.processor.{name}_lora.{word}.weight"] = tensor
    save_file(first, path)
    table["model"] = bases[base]
    how = {"rank": 4, "alpha": 4.0, "train": ["unet"]}
    assert problems(path, targets="attention", **how) == []
    [more] = problems(path, targets="attention+ff", **how)
    assert "a.safetensors lacks " in more
    half = _saved(path, {key: tensor for key, tensor in first.items() if ".to_q_lora.up" not in key})
    assert "lacks its up matrix" in problems(half, targets="attention", **how)[0]


def test_a_base_of_names_that_no_rule_knows_is_left_to_the_loading(
    problems: Problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdtrain.training.warm_start_check.unet_layers", lambda _: Layers({}, {}))
    assert problems(lora(tmp_path / "a.safetensors")) == []


@cache
def networks() -> Any:
    from sdtrain.commands.files.merge import read_base

    return read_base(BASE)[0].networks


def write_adapters(path: Path, kind: Any, names: Any, targets: Any) -> None:
    """Write fresh adapters of a kind on the embedded model's U-Net."""
    import copy

    unet = copy.deepcopy(networks()["unet"])
    modules = select_modules(unet, targets)
    attach_adapters(unet, modules, AdapterSettings(kind, 4), torch.Generator().manual_seed(1))
    whole = {**networks(), "unet": unet}
    facts = FileFacts(title="test", date="2026-11-22T15:00:00+00:00")
    write_lora(path, {"unet": adapter_weights(unet)}, whole, names=names, facts=facts)


def test_what_no_rule_knows_is_left_out() -> None:
    assert own_unet_names([]) == {} and own_unet_names(["input_blocks.0.0", "time_embed.0"]) == {}
    known = own_unet_names(["input_blocks.0.0", "input_blocks.3.0.op", "a.b", "middle_block.7.x", "out.2"])
    assert known == {
        "input_blocks.0.0": "conv_in",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "out.2": "conv_out",
    }
