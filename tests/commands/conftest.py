"""The built-in model, and the same as a single file in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdtrain.commands.files.merge import read_base
from sdtrain.families.modelspec import Description
from sdtrain.models.model import Model


@pytest.fixture(scope="module")
def tiny() -> Model:
    return read_base("builtin:tiny-sdxl")[0]


@pytest.fixture(scope="module")
def base(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    tiny.write_checkpoint(path, Description("base", (128, 128)), layout="single-file", dtype=torch.float32)
    return path
