"""What files of LyCORIS change of normalisations and biases is merged, and named where no LoRA can hold it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from sdtrain.adapters.attach import AdapterSettings, attach_adapters
from sdtrain.adapters.formats.layer_names import sd_scripts_names
from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.adapters.loading.warm_start import start_from
from sdtrain.adapters.low_rank import RankRule
from sdtrain.adapters.merge import merge_into
from sdtrain.adapters.shares import Share
from sdtrain.cli import app
from sdtrain.commands.files.difference import lora_difference
from sdtrain.commands.files.extract import resize_lora
from sdtrain.commands.files.merge import merge, read_base
from sdtrain.commands.files.sums import merge_loras
from sdtrain.errors import UserError
from sdtrain.models.model import Model
from tests.commands.test_merge import FOLDER

LORA = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
NORMS = [
    ("unet", "mid_block.resnets.0.norm1"),
    ("unet", "mid_block.attentions.0.transformer_blocks.0.norm2"),
    ("unet", "conv_norm_out"),
    ("text_encoder", "encoder.layers.0.layer_norm1"),
    ("text_encoder_2", "text_model.final_layer_norm"),
]
WHOLE = [
    ("unet", "mid_block.resnets.0.conv1"),
    ("text_encoder_2", "text_model.encoder.layers.1.self_attn.k_proj"),  # a third of a fused matrix, and of its bias
]


def parameter(model: Model, component: str, module: str, leaf: str) -> Tensor:
    return model.networks[component].get_parameter(f"{module}.{leaf}").detach()


@pytest.fixture(scope="module")
def lycoris(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str, str], Tensor]]:
    """A file, and the change of each parameter that it means."""
    generator = torch.Generator().manual_seed(1)
    names = sd_scripts_names(tiny.networks, norms=True)
    tensors: dict[str, Tensor] = {}
    wanted: dict[tuple[str, str, str], Tensor] = {}
    for layers, parts in ((NORMS, ("w_norm", "b_norm")), (WHOLE, ("diff", "diff_b"))):
        for component, module in layers:
            for leaf, part in zip(("weight", "bias"), parts, strict=True):
                change = torch.randn(parameter(tiny, component, module, leaf).shape, generator=generator)
                tensors[f"{names[component][module]}.{part}"] = wanted[component, module, leaf] = change
    up, down = torch.randn(96, 2, generator=generator), torch.randn(2, 96, generator=generator)
    assert parameter(tiny, *LORA, "weight").shape == up.shape[:1] + down.shape[1:]
    name = names[LORA[0]][LORA[1]]
    tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
    wanted[*LORA, "weight"] = up @ down
    path = tmp_path_factory.mktemp("lycoris") / "a.safetensors"
    save_file(tensors, path)
    return path, wanted


Lycoris = tuple[Path, dict[tuple[str, str, str], Tensor]]


def is_changed_by(before: Model, after: Model, wanted: dict[tuple[str, str, str], Tensor], times: float) -> None:
    for component, network in before.networks.items():
        for name, old in network.named_parameters():
            new = after.networks[component].get_parameter(name)
            change = wanted.get((component, *name.rsplit(".", 1)))  # type: ignore[arg-type]
            told = 0.0 if change is None else times * change
            torch.testing.assert_close(new.detach(), old.detach() + told, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", ["single-file", "folder"])
def test_norms_and_biases_are_merged(tiny: Model, base: Path, lycoris: Lycoris, tmp_path: Path, layout: str) -> None:
    out = tmp_path / ("out.safetensors" if layout == "single-file" else "out")
    done = merge(str(base), [(lycoris[0], Share(0.5))], out, layout, FOLDER)  # type: ignore[arg-type]
    assert done.changed == len(NORMS) + len(WHOLE) + 1
    is_changed_by(tiny, read_base(str(out), FOLDER)[0], lycoris[1], 0.5)


def test_norms_and_biases_are_drawn_with(tiny: Model, lycoris: Lycoris) -> None:
    model = read_base(FOLDER)[0]
    merge_into(model.networks, [(read_lora(lycoris[0], model.networks).adapters, 0.25), ({}, 1.0)])
    is_changed_by(tiny, model, lycoris[1], 0.25)


def test_a_file_of_lora_holds_none_of_them(lycoris: Lycoris, tmp_path: Path) -> None:
    """Each is named, and the rest is used only if that is asked for."""
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"layer_norm1 +is diff; only LoRA has a rank[^|]*uses the 1 layers"):
        resize_lora(lycoris[0], FOLDER, RankRule(1), out)
    with pytest.raises(UserError, match=r"layer_norm1 +changes a bias or a normalisation[^|]*uses the 1 layers"):
        merge_loras([(lycoris[0], Share())], FOLDER, out, 4, 1.0)
    assert not out.exists()
    read = resize_lora(lycoris[0], FOLDER, RankRule(1), out, partial=True)
    assert len(read.left_out) == len(NORMS) + len(WHOLE)
    done = merge_loras([(lycoris[0], Share())], FOLDER, tmp_path / "sum.safetensors", None, 1.0, partial=True)
    assert (done.changed, len(done.left_out)) == (1, len(NORMS) + len(WHOLE))


def test_a_run_does_not_start_from_them(lycoris: Lycoris) -> None:
    networks = read_base(FOLDER)[0].networks
    attach_adapters(networks["unet"], [LORA[1]], AdapterSettings("lora", 2), torch.Generator())
    with pytest.raises(UserError, match=r"norm_out +changes a bias or a normalisation, which no run here trains"):
        start_from(lycoris[0], networks)


def test_their_distance_counts(tiny: Model, lycoris: Lycoris, tmp_path: Path) -> None:
    name = sd_scripts_names(tiny.networks, norms=True)["unet"]["conv_norm_out"]
    files = []
    for number in (3.0, 4.0):
        files.append(tmp_path / f"{number}.safetensors")
        width = parameter(tiny, "unet", "conv_norm_out", "bias").shape
        save_file({f"{name}.w_norm": torch.zeros(width), f"{name}.b_norm": torch.full(width, number)}, files[-1])
    found = lora_difference(files[0], files[1], FOLDER)
    assert found.blocks["unet conv_norm_out"].share == pytest.approx(1 / 3)


def test_a_change_of_another_width_is_named(tiny: Model, tmp_path: Path) -> None:
    names = sd_scripts_names(tiny.networks, norms=True)["unet"]
    bad = {
        f"{names['conv_norm_out']}.w_norm": torch.zeros(7),
        f"{names['mid_block.resnets.0.norm1']}.w_norm": torch.zeros(96),
        f"{names['mid_block.resnets.0.norm1']}.b_norm": torch.zeros(3),
        f"{names[LORA[1]]}.diff": torch.zeros(96, 96),
        f"{names[LORA[1]]}.diff_b": torch.zeros(96),
    }
    save_file(bad, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        read_lora(tmp_path / "a.safetensors", tiny.networks)
    told = [problem.what for problem in caught.value.problems]
    assert "is for a layer of shape (7,)" in str(told)
    assert "has a bias of 3 numbers for 96 outputs" in str(told)
    assert "changes a bias, which this layer does not have" in str(told)


def test_info_tells_what_lies_beside_the_layers(lycoris: Lycoris, tmp_path: Path) -> None:
    more = load_file(lycoris[0]) | {"bundle_emb.ring.string_to_param.*": torch.zeros(2, 64)}
    save_file(more, tmp_path / "a.safetensors")
    output = CliRunner().invoke(app, ["info", str(tmp_path / "a.safetensors")]).output
    assert f"{len(NORMS)} normalisations, text embedding ring" in " ".join(output.split())
