"""Files of every kind, read as other tools read them: by diffusers, by peft, and by the formulas for LyCORIS files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, adapter_weights, attach_adapters
from sdtrain.adapters.formats.conventions import Names
from sdtrain.adapters.formats.layer_names import sd_scripts_names
from sdtrain.adapters.formats.lora_file import read_lora, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import AdapterKind, AdapterWeights, delta

MakeNetworks = Callable[[], dict[str, nn.Module]]
FACTS = FileFacts(title="test", date="2026-11-22T15:00:00+00:00")
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_2 = ["text_model.encoder.layers.1.self_attn.k_proj"]
MODULES = [TO_Q, "mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1", "down_blocks.1.attentions.0.proj_out"]


def written(networks: dict[str, nn.Module], path: Path, kind: AdapterKind, names: Names) -> dict[str, AdapterWeights]:
    """Adapters with values, on a copy of the U-Net; ranks and alphas differ where the kind has them."""
    unet = networks["unet"]
    modules = [TO_Q, "mid_block.attentions.0.proj_in"] if kind == "oft" else MODULES
    mixed = AdapterSettings(kind, 4, 3.0, {"*proj*": 40, "*conv*": 2}, {"*to_q": 1.5})
    settings = AdapterSettings(kind, 4) if kind == "oft" else mixed
    parameters = attach_adapters(unet, modules, settings, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    weights = adapter_weights(unet)
    write_lora(path, {"unet": weights}, networks, names=names, facts=FACTS)
    return weights


@torch.no_grad()
def prediction(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    conditions = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 64, generator=generator)
    found: Tensor = unet(noisy, 500, text, added_cond_kwargs=conditions).sample
    return found


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "lokr"])
def test_diffusers_loads_the_kinds_it_knows(make_networks: MakeNetworks, tmp_path: Path, kind: AdapterKind) -> None:
    path = tmp_path / "a.safetensors"
    ours, theirs = make_networks(), make_networks()["unet"]
    written(ours, path, kind, "diffusers")
    before = prediction(theirs)
    theirs.load_lora_adapter(str(path), prefix="unet", use_safetensors=True)  # or it does not look at the header
    torch.testing.assert_close(prediction(theirs), prediction(ours["unet"]), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(prediction(theirs), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_readers_that_skip_the_header_compute_the_same_where_alpha_could_be_multiplied_in(
    make_networks: MakeNetworks, tmp_path: Path, kind: AdapterKind
) -> None:
    path = tmp_path / "a.safetensors"
    ours, theirs = make_networks(), make_networks()["unet"]
    modules = MODULES[:2] if kind == "lokr" else MODULES  # diffusers cannot tell the factors of a convolution apart
    parameters = attach_adapters(ours["unet"], modules, AdapterSettings(kind, 8, 2.0), torch.Generator().manual_seed(1))
    for parameter in parameters.values():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
    write_lora(path, {"unet": adapter_weights(ours["unet"])}, ours, names="diffusers", facts=FACTS)
    theirs.load_lora_adapter(load_file(path), prefix="unet")
    torch.testing.assert_close(prediction(theirs), prediction(ours["unet"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_peft_loads_what_diffusers_does_not(make_networks: MakeNetworks, tmp_path: Path, kind: AdapterKind) -> None:
    from peft import LoHaConfig, LoKrConfig, OFTConfig, inject_adapter_in_model, set_peft_model_state_dict

    path = tmp_path / "a.safetensors"
    ours, theirs = make_networks(), make_networks()["unet"]
    written(ours, path, kind, "diffusers")
    with safe_open(path, "pt") as file:
        said: dict[str, Any] = json.loads(file.metadata()["lora_adapter_metadata"])
    config = {"loha": LoHaConfig, "lokr": LoKrConfig, "oft": OFTConfig}[kind]
    inject_adapter_in_model(config(**{key.removeprefix("unet."): value for key, value in said.items()}), theirs)
    tensors = {key.removeprefix("unet."): tensor for key, tensor in load_file(path).items()}
    assert not set_peft_model_state_dict(theirs, tensors).unexpected_keys
    if kind == "lokr":  # peft scales whole factors too; the file says alpha = rank for them
        assert any(layer.scaling["default"] == 1.0 for layer in theirs.modules() if hasattr(layer, "lokr_w1"))
    torch.testing.assert_close(prediction(theirs), prediction(ours["unet"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
def test_what_diffusers_writes_is_read(make_networks: MakeNetworks, tmp_path: Path, spelling: str) -> None:
    from diffusers import StableDiffusionXLPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    networks = make_networks()
    wanted = {}
    for component, modules in (
        ("unet", MODULES),
        ("text_encoder", ["encoder.layers.0.mlp.fc1"]),
        ("text_encoder_2", TEXT_2),
    ):
        settings = AdapterSettings("lora", 4, 3.0, {"*proj*": 6}, {"*to_q": 1.5})
        parameters = attach_adapters(networks[component], modules, settings, torch.Generator().manual_seed(1))
        for parameter in parameters.values():
            parameter.data.normal_(generator=torch.Generator().manual_seed(2))
        wanted[component] = adapter_weights(networks[component])
    states = {name: get_peft_model_state_dict(networks[name]) for name in wanted}
    if spelling == "diffusers":
        states = {name: convert_state_dict_to_diffusers(state) for name, state in states.items()}
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        text_encoder_2_lora_layers=states["text_encoder_2"],
        **_collate_lora_metadata({name: networks[name] for name in wanted}),
    )
    read = read_lora(tmp_path / "pytorch_lora_weights.safetensors", make_networks()).adapters
    assert {name: set(modules) for name, modules in read.items()} == {name: set(w) for name, w in wanted.items()}
    for component, weights in wanted.items():
        for module, lora in weights.items():
            found, base = read[component][module], torch.zeros(())
            torch.testing.assert_close(delta(found, base), delta(lora, base), rtol=1e-5, atol=1e-6)


def test_the_names_of_the_first_diffusers_loras_are_read(make_networks: MakeNetworks, tmp_path: Path) -> None:
    networks = {"unet": make_networks()["unet"]}
    layer = TO_Q.removesuffix("to_q")
    tensors = {}
    for name in ("to_q", "to_out"):
        tensors[f"unet.{layer}processor.{name}_lora.down.weight"] = torch.ones(2, 64)
        tensors[f"unet.{layer}processor.{name}_lora.up.weight"] = torch.ones(64, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", networks).adapters["unet"]
    assert {module: weights.alpha for module, weights in read.items()} == {TO_Q: 2.0, f"{layer}to_out.0": 2.0}


def lycoris_reader(parts: dict[str, Tensor], base: Tensor) -> Tensor:
    """dW as readers of LyCORIS files compute it, each formula written out from the shapes of the file's own tensors."""
    alpha = parts["alpha"].item()
    if "lora_up.weight" in parts:
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        change = (up.flatten(1) @ down.flatten(1)).reshape(base.shape) * alpha / down.shape[0]
        if "dora_scale" in parts:
            merged = base + change
            assert parts["dora_scale"].shape == (base.shape[0], *[1] * (base.dim() - 1))
            lengths = merged.reshape(base.shape[0], -1).norm(dim=1).reshape(parts["dora_scale"].shape)
            change = merged * parts["dora_scale"] / lengths - base
        return change
    if "hada_w1_a" in parts:
        product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        return product.reshape(base.shape) * alpha / parts["hada_w1_b"].shape[0]
    dim = None
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            factors.append(parts[name])
        else:
            dim = parts[f"{name}_b"].shape[0]
            factors.append(parts[f"{name}_a"] @ parts[f"{name}_b"])
    if factors[1].dim() == 4:
        factors[0] = factors[0][:, :, None, None]
    return torch.kron(factors[0], factors[1]).reshape(base.shape) * (1.0 if dim is None else alpha / dim)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_lycoris_formulas_give_the_same_change(make_networks: MakeNetworks, tmp_path: Path, kind: AdapterKind) -> None:
    path = tmp_path / "a.safetensors"
    ours, plain = make_networks(), make_networks()["unet"]
    weights = written(ours, path, kind, "sd-scripts")
    tensors, names = load_file(path), sd_scripts_names({"unet": plain})["unet"]
    read = set()
    for module, adapter in weights.items():
        parts = {key.split(".", 1)[1]: tensor for key, tensor in tensors.items() if key.split(".")[0] == names[module]}
        read |= {f"{names[module]}.{part}" for part in parts}
        base = plain.get_submodule(module).weight
        wanted = delta(adapter, base)
        assert wanted.norm() > 0
        assert (lycoris_reader(parts, base) - wanted).norm() <= 1e-3 * wanted.norm()
    assert read == set(tensors)
