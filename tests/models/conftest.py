"""Small models of random weights, and files made of them, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdtrain.config.schema import ModelConfig
from sdtrain.families.modelspec import Description
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.models.checkpoints.single_file import write_single_file

BUILTIN = "builtin:tiny-sdxl"
DESCRIPTION = Description(title="tiny", resolution_px=(128, 128), date="2026-01-01T00:00:00Z")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> Components:
    """The built-in model; tests do not change it."""
    return load_components(open_model(ModelConfig(path=BUILTIN), "model"), torch.float32)


@pytest.fixture(scope="session")
def single_file(tiny: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in the original layout; tests do not change it."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    write_single_file(tiny, path, DESCRIPTION)
    return path


@pytest.fixture
def rewrite(single_file: Path, tmp_path: Path):
    """A function that writes the single file with other tensors or metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    def write(change, metadata: dict[str, str] | None = None, name: str = "changed.safetensors") -> Path:
        tensors = load_file(single_file)
        with safe_open(single_file, "pt") as file:
            own = dict(file.metadata())
        changed = change(tensors)
        save_file(
            tensors if changed is None else changed, tmp_path / name, metadata=own if metadata is None else metadata
        )
        return tmp_path / name

    return write
