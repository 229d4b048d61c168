"""Files whose bytes are whole and whose tensors are strange: whoever opens them, the answer is a sentence."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from sdtrain.adapters.formats.describe import describe_file
from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.commands.files.info import file_info
from sdtrain.config.schema import ModelConfig
from sdtrain.errors import UserError, printable
from sdtrain.files.header import BITS, read_header
from sdtrain.models.checkpoints.inspect import inspect_model, open_model
from sdtrain.models.load import load_model
from sdtrain.training.keeping.states import _header as read_state_file

BUILTIN = Path(__file__).parents[2] / "sdtrain" / "builtin" / "tiny-sdxl"
COMPONENTS = "builtin:tiny-sdxl"
CHANGES = st.sampled_from(["rename", "nonsense", "flat", "transposed", "split", "integers", "bytes", "swap", "empty"])
WITHOUT_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""The edits are few and say where; files are slow to write anew a hundred times."""
EDITS = st.lists(st.tuples(CHANGES, st.integers(0, 10_000)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as one file."""
    from sdtrain.commands.files.merge import read_base
    from sdtrain.families.modelspec import Description

    path = tmp_path_factory.mktemp("strange") / "whole.safetensors"
    model, size = read_base(COMPONENTS)
    model.write_checkpoint(path, Description(title="x", resolution_px=size), layout="single-file")
    return path


@cache
def networks() -> dict[str, nn.Module]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(BUILTIN / "unet")
        return {"unet": UNet2DConditionModel.from_config(config)}


def lora() -> bytes:
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    shapes = {f"{layer}.lora_down.weight": [2, 64], f"{layer}.lora_up.weight": [64, 2], f"{layer}.alpha": []}
    header, start = dict[str, Any](), 0
    for name, shape in shapes.items():
        size = 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    return packed(header, bytes(start))


def packed(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def edited(content: bytes, edits: list[tuple[str, int]]) -> bytes:
    """The file with some of its tensors called or shaped otherwise; the bytes behind the header are the same."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    for kind, number in edits:
        names = [name for name in header if name != "__metadata__"]
        name = names[number % len(names)]
        entry = header[name]
        numbers = entry["data_offsets"][1] - entry["data_offsets"][0]
        match kind:
            case "rename":
                header[name + ".more"] = header.pop(name)
            case "nonsense":
                header["\u202e[/]" + str(number)] = header.pop(name)
            case "flat":
                entry["shape"] = [numbers * 8 // BITS[entry["dtype"]]]
            case "transposed":
                entry["shape"] = entry["shape"][::-1]
            case "split":
                entry["shape"] = [*entry["shape"], 1, 1, 1]
            case "integers":
                entry["dtype"] = {"F32": "I32", "F16": "I16"}.get(entry["dtype"], entry["dtype"])
            case "bytes":
                entry |= {"dtype": "U8", "shape": [numbers]}
            case "swap":
                other = names[(number + 1) % len(names)]
                header[name], header[other] = header[other], header[name]
            case "empty":
                header[f"empty.{number}"] = {"dtype": "F32", "shape": [0, 3], "data_offsets": [numbers * 0] * 2}
    return packed(header, content[8 + length :])


def sentence(error: UserError) -> str:
    text = error.text()
    assert text == "\n".join(map(printable, text.split("\n")))
    return text


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=WITHOUT_SHRINKING,
)
@given(EDITS)
def test_a_strange_lora_is_described_read_or_refused(tmp_path: Path, edits: list[tuple[str, int]]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(edited(lora(), edits))
    for read in (describe_file, file_info, read_state_file, lambda path: read_lora(path, networks())):
        try:
            read(path)
        except UserError as error:
            sentence(error)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=WITHOUT_SHRINKING,
)
@given(EDITS)
def test_a_strange_model_is_opened_or_refused(tmp_path: Path, single_file: Path, edits: list[tuple[str, int]]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(edited(single_file.read_bytes(), edits))
    for config in (
        ModelConfig(path=str(path), components=COMPONENTS),
        ModelConfig(path=COMPONENTS, vae=str(path)),
    ):
        opened, problems = inspect_model(config)
        assert opened is not None or problems
        if problems:
            sentence(UserError("model", problems))
    for read in (describe_file, file_info):
        try:
            read(path)
        except UserError as error:
            sentence(error)


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=WITHOUT_SHRINKING,
)
@given(EDITS)
def test_a_strange_model_is_loaded_or_refused(tmp_path: Path, single_file: Path, edits: list[tuple[str, int]]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(edited(single_file.read_bytes(), edits))
    for config in (
        ModelConfig(path=str(path), components=COMPONENTS),
        ModelConfig(path=COMPONENTS, vae=str(path)),
    ):
        try:
            load_model(open_model(config, "model"), config, device=torch.device("cpu"), dtype=torch.float32)
        except UserError as error:
            sentence(error)


def test_the_files_that_are_changed_here_are_good_ones(tmp_path: Path, single_file: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora())
    assert list(read_lora(path, networks()).adapters) == ["unet"]
    path.write_bytes(edited(single_file.read_bytes(), []))
    assert read_header(path).entries
    assert inspect_model(ModelConfig(path=str(path), components=COMPONENTS))[1] == []
