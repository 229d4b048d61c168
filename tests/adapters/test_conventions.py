"""What other tools write is read, whatever they call it, with the same dW; what cannot be used is named, one by one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, adapter_weights, attach_adapters
from sdtrain.adapters.formats.alphas import rescaled
from sdtrain.adapters.formats.conventions import known_key
from sdtrain.adapters.formats.describe import describe_file
from sdtrain.adapters.formats.layer_names import sd_scripts_names
from sdtrain.adapters.formats.lora_file import read_lora, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.formats.tensor_names import encode
from sdtrain.adapters.kinds import AdapterWeights, DoraWeights, LoraWeights, delta
from sdtrain.adapters.layers import layer_names, plain_modules
from sdtrain.adapters.low_rank import RankRule, resize
from sdtrain.errors import UserError
from sdtrain.families.original_names import original_unet_names
from tests.adapters.test_reader_table import random_weights

Networks = dict[str, nn.Module]
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
FACTS = FileFacts(title="test", date="2026-11-22T15:00:00+00:00")


@pytest.fixture(scope="module")
def networks(make_networks: Callable[[], Networks]) -> Networks:
    return make_networks()


def weight(networks: Networks, module: str, component: str = "unet") -> Tensor:
    found = dict(plain_modules(networks[component]))[module].weight
    assert isinstance(found, Tensor)
    return found.detach()


def original(networks: Networks, module: str) -> str:
    return original_unet_names(layer_names(networks["unet"]))[module]


CONVENTIONS: dict[str, Callable[[Networks, str], tuple[str, str]]] = {
    "peft": lambda _, module: (f"base_model.model.{module}", "diffusers"),
    "no prefix": lambda _, module: (module, "diffusers"),
    "SimpleTuner": lambda _, module: ("lycoris_" + module.replace(".", "_"), "sd-scripts"),
    "OneTrainer": lambda _, module: ("lora_unet_" + module.replace(".", "_"), "sd-scripts"),
    "ComfyUI": lambda n, module: ("diffusion_model." + original(n, module), "sd-scripts"),
    "generic": lambda n, module: ("diffusion_model." + original(n, module), "diffusers"),
}


def write(networks: Networks, path: Path, convention: str, adapters: dict[str, AdapterWeights]) -> None:
    tensors: dict[str, Tensor] = {}
    for module, weights in adapters.items():
        name, parts = CONVENTIONS[convention](networks, module)
        values = encode(weights, parts)  # type: ignore[arg-type]
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in values.items()}
        if convention == "generic":
            tensors[f"{name}.alpha"] = torch.tensor(weights.alpha)
    said = {}
    ranks = {module: weights.rank for module, weights in adapters.items()}
    peft = {"r": 1, "lora_alpha": 3.0, "rank_pattern": ranks, "alpha_pattern": {}, "use_rslora": False}
    if convention == "peft":
        path.with_name("adapter_config.json").write_text(json.dumps(peft))
    elif convention == "no prefix":
        said = {"lora_adapter_metadata": json.dumps(peft)}
    save_file(tensors, path, said)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    convention=st.sampled_from(sorted(CONVENTIONS)),
    kinds=st.sampled_from(["lora", "dora", "loha", "lokr", "diff"]),
    modules=st.data(),
    seed=st.integers(0, 9),
)
def test_every_convention_gives_the_same_change(
    networks: Networks, convention: str, kinds: str, modules: st.DataObject, seed: int
) -> None:
    of_peft = CONVENTIONS[convention](networks, TO_Q)[1] == "diffusers"
    kind = "lora" if of_peft and kinds not in ("lora", "dora") else kinds
    every = layer_names(networks["unet"])
    chosen = modules.draw(st.lists(st.sampled_from(every), min_size=1, max_size=4, unique=True))
    generator = torch.Generator().manual_seed(seed)
    adapters = {name: random_weights(kind, weight(networks, name), generator) for name in chosen}  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        write(networks, path, convention, adapters)
        read = read_lora(path, networks)
        assert dict(describe_file(path).num_modules) == {"unet": len(chosen)}
        assert describe_file(path).kind == kind
    assert set(read.adapters["unet"]) == set(chosen)
    assert not read.left_out
    for name, weights in adapters.items():
        base = weight(networks, name)
        torch.testing.assert_close(delta(read.adapters["unet"][name], base), delta(weights, base))


TEXT_PREFIXES: dict[str, tuple[str, str, str]] = {
    "sd-scripts": ("lora_te1_", "lora_te2_", "_"),
    "diffusers": ("text_encoder.", "text_encoder_2.", "."),
    "ComfyUI": ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.", "."),
}
"""What begins a name in the first and in the second text encoder, and what joins its pieces."""


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    convention=st.sampled_from(sorted(TEXT_PREFIXES)),
    kinds=st.sampled_from(["lora", "dora", "loha", "lokr", "diff"]),
    short=st.booleans(),
    layers=st.data(),
    seed=st.integers(0, 9),
)
def test_every_convention_gives_the_same_change_in_text_encoders(
    networks: Networks, convention: str, kinds: str, short: bool, layers: st.DataObject, seed: int
) -> None:
    """short: without `text_model.`, as diffusers writes them with transformers 5."""
    kind = "lora" if convention == "diffusers" and kinds not in ("lora", "dora") else kinds
    generator = torch.Generator().manual_seed(seed)
    *prefixes, joint = TEXT_PREFIXES[convention]
    wanted: dict[tuple[str, str], AdapterWeights] = {}
    tensors: dict[str, Tensor] = {}
    for component, prefix in zip(("text_encoder", "text_encoder_2"), prefixes, strict=True):
        every = [name for name in layer_names(networks[component]) if name != "text_projection"]
        for module in layers.draw(st.lists(st.sampled_from(every), min_size=1, max_size=3, unique=True)):
            weights = random_weights(kind, weight(networks, module, component), generator)  # type: ignore[arg-type]
            if isinstance(weights, LoraWeights | DoraWeights) and convention == "diffusers":
                weights = rescaled(weights, float(weights.rank))  # for which no header is needed
            wanted[component, module] = weights
            plain = module.removeprefix("text_model.")
            name = plain if short and convention == "diffusers" else f"text_model.{plain}"
            for part, tensor in encode(weights, "diffusers" if joint == "." else "sd-scripts").items():
                tensors[prefix + name.replace(".", joint) + f".{part}"] = tensor.contiguous()
            if convention == "ComfyUI" and kind != "diff":
                tensors[f"{prefix}{name}.alpha"] = torch.tensor(weights.alpha)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "a.safetensors")
        read = read_lora(Path(folder) / "a.safetensors", networks).adapters
    assert {(component, module) for component, modules in read.items() for module in modules} == set(wanted)
    for (component, module), weights in wanted.items():
        base = weight(networks, module, component)
        torch.testing.assert_close(delta(read[component][module], base), delta(weights, base))


@given(st.text(max_size=60))
def test_no_key_is_too_strange_to_be_looked_at(key: str) -> None:
    assert isinstance(known_key(key), str)
    assert known_key("lora_unet_" + key) == "lora_unet_" + key
    assert known_key("unet." + key) == "unet." + key


def test_text_encoders_as_comfyui_saves_them(networks: Networks, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    wanted = {}
    for component, clip in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        module = next(name for name in layer_names(networks[component]) if name.endswith("layers.1.self_attn.k_proj"))
        wanted[component] = random_weights("lora", weight(networks, module, component), generator)
        name = f"text_encoders.{clip}.transformer.text_model.{module.removeprefix('text_model.')}"
        tensors |= {f"{name}.{part}": tensor for part, tensor in encode(wanted[component], "sd-scripts").items()}
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", networks).adapters
    for component, weights in wanted.items():
        [found] = read[component].values()
        torch.testing.assert_close(delta(found, torch.zeros(())), delta(weights, torch.zeros(())))


def test_what_diffusers_saves_of_a_network_alone_is_read(make_networks: Callable[[], Networks], tmp_path: Path) -> None:
    networks = make_networks()
    parameters = attach_adapters(
        networks["unet"], [TO_Q, CONV], AdapterSettings("lora", 4, 3.0, {"*conv*": 2}), torch.Generator().manual_seed(1)
    )
    for parameter in parameters.values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(2))
    networks["unet"].peft_config = {"default": next(iter(networks["unet"].peft_config.values()))}
    networks["unet"]._hf_peft_config_loaded = True
    networks["unet"].save_lora_adapter(tmp_path, adapter_name="default")
    [path] = tmp_path.glob("*.safetensors")
    read = read_lora(path, make_networks()).adapters["unet"]
    for module, weights in adapter_weights(networks["unet"]).items():
        torch.testing.assert_close(delta(read[module], torch.zeros(())), delta(weights, torch.zeros(())))


def test_a_file_of_peft_without_its_settings_is_refused(networks: Networks, tmp_path: Path) -> None:
    save_file({f"base_model.model.{TO_Q}.lora_A.weight": torch.ones(2, 64)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"alpha stands in adapter_config.json: put that file beside it"):
        read_lora(tmp_path / "a.safetensors", networks)


def sd_lora(networks: Networks, **more: Tensor) -> dict[str, Tensor]:
    base = weight(networks, TO_Q)
    name = sd_scripts_names(networks)["unet"][TO_Q]
    lora = random_weights("lora", base, torch.Generator().manual_seed(1))
    return {f"{name}.{part}": tensor for part, tensor in encode(lora, "sd-scripts").items()} | more


def test_what_cannot_be_used_is_named_and_the_rest_is_used_if_asked(networks: Networks, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    name = sd_scripts_names(networks)["unet"][CONV]
    more = {
        "bundle_emb.zorbit.string_to_param.*": torch.ones(2, 32),
        "lora_unet_out_0.w_norm": torch.ones(33),
        "lora_unet_out_0.b_norm": torch.ones(33),
        f"{name}.oft_blocks": torch.ones(2, 4, 16, 16),
    }
    save_file(sd_lora(networks, **more), path)
    with pytest.raises(UserError) as caught:
        read_lora(path, networks)
    said = str(caught.value)
    for text in (
        "bundle_emb.zorbit",
        "is a text embedding",
        "lora_unet_out_0",
        "is for a layer of shape (33,)",
        name,
        "`oft_blocks`",
    ):
        assert text in said
    assert "uses the 1 layers that fit" in said
    read = read_lora(path, networks, partial=True)
    assert list(read.adapters["unet"]) == [TO_Q]
    assert len(read.left_out) == 3
    save_file({f"{name}.oft_blocks": torch.ones(2, 4, 16, 16)}, path)
    with pytest.raises(UserError, match="oft_blocks"):
        read_lora(path, networks, partial=True)


@pytest.mark.parametrize("kind", ["locon", "loha", "lokr"])
def test_tucker_convolutions_are_multiplied_out(networks: Networks, tmp_path: Path, kind: str) -> None:
    """dW[o, i, y, x] as a loop over the ranks, which is what the decomposition means."""
    generator = torch.Generator().manual_seed(1)
    base, name = weight(networks, CONV), sd_scripts_names(networks)["unet"][CONV]
    out, width, rank = *base.shape[:2], 3

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def cored(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ranks = [(a, b) for a in range(core.shape[0]) for b in range(core.shape[1])]
        return sum(first[a][:, None, None, None] * second[b][None, :, None, None] * core[a, b] for a, b in ranks)

    if kind == "locon":
        parts = {"lora_down.weight": some(rank, width, 1, 1), "lora_up.weight": some(out, rank, 1, 1)}
        parts["lora_mid.weight"] = some(rank, rank, 3, 3)
        up, down = parts["lora_up.weight"].flatten(1).T, parts["lora_down.weight"].flatten(1)
        wanted = cored(parts["lora_mid.weight"], up, down)
    elif kind == "loha":
        parts = {f"hada_w{n}_a": some(rank, out) for n in "12"} | {f"hada_w{n}_b": some(rank, width) for n in "12"}
        parts |= {f"hada_t{n}": some(rank, rank, 3, 3) for n in "12"}
        left, right = (cored(parts[f"hada_t{n}"], parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in "12")
        wanted = left * right
    else:
        parts = {"lokr_w1": some(2, 2), "lokr_t2": some(rank, rank, 3, 3)}
        parts |= {"lokr_w2_a": some(rank, out // 2), "lokr_w2_b": some(rank, width // 2)}
        second = cored(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        wanted = torch.cat([torch.cat([second * parts["lokr_w1"][y, x] for x in (0, 1)], 1) for y in (0, 1)], 0)
    parts["alpha"] = torch.tensor(1.5)
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors", networks).adapters["unet"][CONV]
    torch.testing.assert_close(delta(found, base), 0.5 * wanted, rtol=1e-4, atol=1e-4)


def test_lengths_for_each_input_are_read(networks: Networks, tmp_path: Path) -> None:
    """V m / |V| over columns; a row of lengths, (1, in), is what tells them from those of outputs."""
    module = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    base = weight(networks, module)
    assert base.shape[0] != base.shape[1]
    name = sd_scripts_names(networks)["unet"][module]
    lora = random_weights("lora", base, torch.Generator().manual_seed(1))
    assert isinstance(lora, LoraWeights)
    lengths = torch.rand(1, base.shape[1], generator=torch.Generator().manual_seed(2))
    tensors = {f"{name}.{part}": tensor for part, tensor in encode(lora, "sd-scripts").items()}
    save_file(tensors | {f"{name}.dora_scale": lengths}, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", networks)
    merged = base + lora.delta()
    wanted = merged * lengths / merged.norm(dim=0, keepdim=True) - base
    torch.testing.assert_close(delta(read.adapters["unet"][module], base), wanted)
    write_lora(tmp_path / "b.safetensors", read.adapters, networks, names="sd-scripts", facts=FACTS)
    assert load_file(tmp_path / "b.safetensors")[f"{name}.dora_scale"].shape == (1, base.shape[1])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_lora_in_eight_bits_is_read_exactly_and_can_be_resized(
    networks: Networks, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {
        key: tensor.to(dtype) if "lora" in key.split(".")[1] else tensor for key, tensor in sd_lora(networks).items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    [found] = read_lora(tmp_path / "a.safetensors", networks).adapters["unet"].values()
    assert isinstance(found, LoraWeights)
    down = next(tensor for key, tensor in tensors.items() if "lora_down" in key)
    assert torch.equal(found.down.float(), down.float())
    small = resize({"unet": {TO_Q: found}}, RankRule(2))
    write_lora(tmp_path / "b.safetensors", small, networks, names="sd-scripts", facts=FACTS)
