"""Merging, extracting and resizing are exact where they can be, and starting from a file starts from that file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sdtrain.adapters.attach import AdapterSettings, adapter_weights, attach_adapters
from sdtrain.adapters.formats.lora_file import write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import AdapterKind, AdapterWeights, LoraWeights, delta
from sdtrain.adapters.loading.warm_start import start_from
from sdtrain.adapters.low_rank import RankRule, approximate, extract, resize
from sdtrain.adapters.merge import merge_into
from sdtrain.adapters.targets import select_modules, select_parameters, select_targets
from sdtrain.errors import UserError

MakeNetworks = Callable[[], dict[str, nn.Module]]
FACTS = FileFacts(title="test", date="2026-11-22T15:00:00+00:00", d={"unet": 2e-4})
MODULES = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1", "conv_in"]


def trained(unet: nn.Module, kind: AdapterKind = "lora", rank: int = 4) -> dict[str, AdapterWeights]:
    modules = MODULES[:1] if kind == "oft" else MODULES
    parameters = attach_adapters(unet, modules, AdapterSettings(kind, rank, 2.0), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter_weights(unet)


@torch.no_grad()
def prediction(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    conditions = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 64, generator=generator)
    found: Tensor = unet(noisy, 500, text, added_cond_kwargs=conditions).sample
    return found


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft"])
def test_merged_computes_what_live_adapters_compute(make_networks: MakeNetworks, kind: AdapterKind) -> None:
    live, merged = make_networks()["unet"], make_networks()["unet"]
    before = prediction(merged)
    weights = trained(live, kind)
    assert merge_into({"unet": merged}, [({"unet": weights}, 1.0)]) == len(weights)
    torch.testing.assert_close(prediction(merged), prediction(live), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prediction(merged), before, rtol=1e-4, atol=1e-5)


def test_several_adapters_add_up_by_weight_in_any_order_and_are_rounded_once(make_networks: MakeNetworks) -> None:
    unet = make_networks()["unet"].to(torch.bfloat16)
    one, other = trained(make_networks()["unet"]), trained(make_networks()["unet"], "dora", 2)
    base = {name: unet.get_submodule(name).weight.clone() for name in MODULES}
    both = copy.deepcopy(unet)
    merge_into({"unet": unet}, [({"unet": one}, 0.5), ({"unet": other}, -1.5)])
    merge_into({"unet": both}, [({"unet": other}, -1.5), ({"unet": one}, 0.5)])
    for name in MODULES:
        wanted = base[name].float() + 0.5 * delta(one[name], base[name]) - 1.5 * delta(other[name], base[name])
        torch.testing.assert_close(unet.get_submodule(name).weight, wanted.to(torch.bfloat16), rtol=8e-3, atol=1e-6)
        torch.testing.assert_close(
            both.get_submodule(name).weight, unet.get_submodule(name).weight, rtol=8e-3, atol=1e-6
        )


def test_what_was_merged_can_be_extracted(make_networks: MakeNetworks) -> None:
    base, tuned = make_networks(), make_networks()
    weights = trained(make_networks()["unet"])
    merge_into(tuned, [({"unet": weights}, 1.0)])
    modules = {component: select_modules(network, "all") for component, network in base.items()}
    found = extract(base, tuned, RankRule(4), modules=modules)
    assert set(found) == {"unet"}
    assert set(found["unet"]) == set(MODULES)
    for name, lora in found["unet"].items():
        wanted = delta(weights[name], base["unet"].get_submodule(name).weight)
        assert lora.rank == 4
        assert (lora.delta() - wanted).norm() <= 1e-3 * wanted.norm()


def test_models_that_do_not_belong_together_are_told(make_networks: MakeNetworks) -> None:
    base, wider = {"unet": nn.Sequential(nn.Linear(2, 3))}, {"unet": nn.Sequential(nn.Linear(4, 3))}
    with pytest.raises(UserError, match=r"unet\.0 +has shape \(3, 2\) in one model and \(3, 4\) in the other"):
        extract(base, wider, RankRule(1), modules={"unet": ["0"]})
    with pytest.raises(UserError, match="no such network"):
        merge_into(base, [({"text_encoder": {"0": LoraWeights(torch.zeros(1, 2), torch.zeros(3, 1), 1.0)}}, 1.0)])


def test_energy_decides_the_rank() -> None:
    left = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))[0]
    right = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(1)))[0][:40]
    values = torch.tensor([8.0, 4.0, 2.0, 1.0] + [0.0] * 36)
    change = left * values @ right
    assert approximate(change, RankRule(40)).rank == 40
    assert approximate(change, RankRule(40, energy=0.94)).rank == 2  # 64 + 16 of 85
    assert approximate(change, RankRule(40, energy=0.95)).rank == 3
    assert approximate(change, RankRule(1, energy=0.95)).rank == 1


def test_the_randomised_decomposition_is_as_good_as_the_whole_one() -> None:
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, 301, dtype=torch.float32) ** -0.7
    left = torch.linalg.qr(torch.randn(300, 300, generator=generator))[0]
    change = left * decay @ torch.linalg.qr(torch.randn(400, 400, generator=generator))[0][:300]
    best = change - (lambda u, s, v: u[:, :8] * s[:8] @ v[:8])(*torch.linalg.svd(change, full_matrices=False))
    found = change - approximate(change, RankRule(8)).delta()
    assert found.norm() <= 1.001 * best.norm()


def test_a_larger_rank_changes_nothing_and_a_smaller_one_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    conv = LoraWeights(torch.randn(6, 5, 3, 3, generator=generator), torch.randn(7, 6, 1, 1, generator=generator), 3.0)
    wanted = conv.delta()
    same = resize({"unet": {"conv": conv}}, RankRule(16))["unet"]["conv"]
    assert (same.rank, same.alpha) == (6, 3.0)
    torch.testing.assert_close(same.delta(), wanted, rtol=1e-4, atol=1e-5)
    smaller = resize({"unet": {"conv": conv}}, RankRule(2))["unet"]["conv"]
    assert (smaller.rank, smaller.alpha) == (2, 1.0)
    values = torch.linalg.svdvals(wanted.flatten(1))
    assert (smaller.delta() - wanted).norm() == pytest.approx(values[2:].norm().item(), rel=1e-4)


def test_only_a_lora_can_be_resized(make_networks: MakeNetworks) -> None:
    weights = trained(make_networks()["unet"], "loha")
    with pytest.raises(UserError, match="is loha; only LoRA"):
        resize({"unet": weights}, RankRule(2))


# Starting from a file


def saved(networks: dict[str, nn.Module], path: Path, names: str = "sd-scripts", kind: AdapterKind = "lora") -> Path:
    write_lora(path, {"unet": trained(networks["unet"], kind)}, networks, names=names, facts=FACTS)
    return path


@pytest.mark.parametrize("names", ["sd-scripts", "diffusers"])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_run_starts_from_the_file(make_networks: MakeNetworks, tmp_path: Path, names: str, kind: AdapterKind) -> None:
    file = saved(first := make_networks(), tmp_path / "a.safetensors", names, kind)
    networks = make_networks()
    attach_adapters(networks["unet"], MODULES, AdapterSettings(kind, 4, 2.0), torch.Generator())
    assert start_from(file, networks) == {"unet": 2e-4}
    torch.testing.assert_close(prediction(networks["unet"]), prediction(first["unet"]))


def test_a_run_of_rotations_starts_from_the_file(make_networks: MakeNetworks, tmp_path: Path) -> None:
    file = saved(first := make_networks(), tmp_path / "a.safetensors", "diffusers", "oft")
    networks = make_networks()
    attach_adapters(networks["unet"], MODULES[:1], AdapterSettings("oft", 4), torch.Generator())
    start_from(file, networks)
    torch.testing.assert_close(prediction(networks["unet"]), prediction(first["unet"]))


@pytest.mark.parametrize("kind", ["rslora", "dora", "loha", "lokr"])
def test_another_alpha_keeps_the_change(make_networks: MakeNetworks, tmp_path: Path, kind: AdapterKind) -> None:
    file = saved(first := make_networks(), tmp_path / "a.safetensors", kind="lora" if kind == "rslora" else kind)
    networks = make_networks()
    attach_adapters(networks["unet"], MODULES, AdapterSettings(kind, 4, 7.0), torch.Generator())
    start_from(file, networks)
    torch.testing.assert_close(prediction(networks["unet"]), prediction(first["unet"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "modules", "message"),
    [
        (AdapterSettings("lora", 8, 2.0), MODULES, r"rank 4 in the file and 8 in this run.*sdtrain resize"),
        (AdapterSettings("dora", 4, 2.0), MODULES, "is lora in the file and dora in this run"),
        (AdapterSettings("lora", 4, 2.0), MODULES[:2], r"conv_in +is in the file, but not trained.*method.targets"),
        (
            AdapterSettings("lora", 4, 2.0),
            [*MODULES, "conv_out"],
            r"conv_out +is trained in this run, but not in the file",
        ),
    ],
)
def test_what_does_not_fit_is_told(
    make_networks: MakeNetworks, tmp_path: Path, settings: AdapterSettings, modules: list[str], message: str
) -> None:
    file = saved(make_networks(), tmp_path / "a.safetensors")
    networks = make_networks()
    attach_adapters(networks["unet"], modules, settings, torch.Generator())
    with pytest.raises(UserError, match=message):
        start_from(file, networks)


# Targets


def test_a_pattern_without_a_layer_is_an_error_with_near_names(make_networks: MakeNetworks) -> None:
    networks = make_networks()
    for pattern, near in (
        ("*attn2.to_qq", r"\*attn2.to_q`"),
        ("attn2.to_q", r"did you mean `\*attn2.to_q`"),
        ("xyz", ""),
    ):
        with pytest.raises(UserError, match=f"`{pattern.replace('*', '[*]')}` matches no layer.*{near}"):
            select_targets({"unet": networks["unet"]}, ["*to_k", pattern])
    with pytest.raises(UserError, match=r"method.ranks +`[*]ff[*]` matches no layer"):
        select_targets({"unet": networks["unet"]}, "attention", ranks=["*ff*"])
    with pytest.raises(UserError, match="mean no layer of text_encoder"):
        select_targets({name: networks[name] for name in ("unet", "text_encoder")}, ["*to_k"])
    found = select_targets(networks, ["*to_k", "*k_proj"], unused={"text_encoder": ["encoder.layers.1"]})
    assert all("layers.1" not in name for name in found["text_encoder"])
    assert len(found["text_encoder"]) == 1


def test_presets_leave_out_what_other_tools_cannot_name(make_networks: MakeNetworks) -> None:
    encoder = make_networks()["text_encoder_2"]
    assert "text_projection" not in select_modules(encoder, "all")
    assert select_modules(encoder, ["text_projection"]) == ["text_projection"]


def test_layers_of_weight_zero_get_no_adapter_and_the_last_match_counts(make_networks: MakeNetworks) -> None:
    networks = {"unet": make_networks()["unet"]}
    every = select_targets(networks, "attention")["unet"]
    weights = {"down_blocks.*": 0.0, "*to_k": 0.5}
    kept = select_targets(networks, "attention", weights=weights)["unet"]
    assert kept == [name for name in every if not name.startswith("down_blocks.") or name.endswith("to_k")]
    settings = AdapterSettings("rslora", 4, 8.0, alphas={"mid*": 2.0}, weights=weights)
    assert [settings.alpha_of(name) for name in ("up.to_k", "mid.to_k", "mid.to_q")] == [4.0, 1.0, 2.0]
    with pytest.raises(UserError, match=r"method.layer_weights +are 0 for every layer of unet"):
        select_targets(networks, "attention", weights={"*": 0.0})
    with pytest.raises(UserError, match=r"method.layer_weights +`\*conv_in` matches no layer that is trained"):
        select_targets(networks, "attention", weights={"*conv_in": 0.5})


def test_a_full_fine_tune_trains_the_parameters_of_all_layers_but_those_of_weight_zero(
    make_networks: MakeNetworks,
) -> None:
    networks = {"unet": make_networks()["unet"]}
    every = [name for name, _ in networks["unet"].named_parameters()]
    assert select_parameters(networks, {})["unet"] == every
    kept = select_parameters(networks, {"mid_block.*": 0.0, "mid_block.resnets.0.conv1": 1.0})["unet"]
    assert kept == [name for name in every if "mid_block." not in name or "mid_block.resnets.0.conv1." in name]
    with pytest.raises(UserError, match=r"`middle` matches no layer that is trained"):
        select_parameters(networks, {"middle": 0.0})
