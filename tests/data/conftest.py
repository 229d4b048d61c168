"""Folders of small pictures, and encoders that count what they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.batches import Batches, Encoders, prepare_batches
from sdtrain.data.examples import scan_folders

# No deadline: on a busy machine any example may take long.
settings.register_profile("data", deadline=None, max_examples=50)
settings.load_profile("data")


class CountingEncoders:
    """Plain functions of pixels and text in place of a VAE and text encoders, and a list of what went through."""

    def __init__(self) -> None:
        self.pictures: list[Tensor] = []
        self.captions: list[str] = []

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        self.pictures += list(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 8).mul(0.3).to(torch.bfloat16)

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        self.captions += captions
        numbers = [sum(caption.encode()) for caption in captions]
        sequence = torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, 7, 4) / 7
        return {"prompt_embeds": sequence.to(torch.bfloat16), "pooled": sequence[:, 0] + 1}

    def encoders(self, *, vae: str = "vae", text: str = "text", captions: bool = True) -> Encoders:
        return Encoders(self.encode_pixels, self.encode_captions if captions else None, vae, text, encode_sizes)


def encode_sizes(sizes: Tensor) -> dict[str, Tensor]:
    return {"time_ids": sizes}


def save_picture(path: Path, size: tuple[int, int], caption: str | None, seed: int = 0) -> None:
    """A PNG of random colours (so that no two are alike) and, unless None, its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng([seed, *size]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(colours).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def data_config(*folders: Path | FolderConfig, **settings: object) -> DataConfig:
    """A small configuration: 64 px, steps of 8."""
    chosen = [one if isinstance(one, FolderConfig) else FolderConfig(path=str(one)) for one in folders]
    return DataConfig.model_validate(
        {"folder": chosen, "resolution_px": 64, "bucket_step_px": 8, "batch_size": 2, **settings}
    )


@pytest.fixture
def counting() -> CountingEncoders:
    return CountingEncoders()


@pytest.fixture
def picture() -> Callable[..., None]:
    return save_picture


@pytest.fixture
def config() -> Callable[..., DataConfig]:
    return data_config


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven pictures of three shapes."""
    folder = tmp_path / "pictures"
    for number, size in enumerate([(64, 64), (90, 90), (70, 64), (128, 64), (100, 50), (40, 80), (64, 65)]):
        save_picture(folder / f"{number}.png", size, f"caption {number}", seed=number)
    return folder


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Batches]:
    """prepare_batches on folders that have no problems, with a cache in the test's own folder."""

    def prepare(
        config: DataConfig, encoders: Encoders, *, seed: int = 0, cache: str = "cache", pin: bool = False
    ) -> Batches:
        examples, problems = scan_folders(config, decode=False)
        assert not problems
        folder = tmp_path / cache
        return prepare_batches(
            config, examples, encoders, cache=folder, seed=seed, on_progress=lambda *_: None, pin=pin
        )

    return prepare
