"""Where a whole picture does not fit into memory, the VAE works tile by tile, and the person is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdtrain.config.schema import ModelConfig
from sdtrain.models import latent_diffusion, tiles
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.models.load import load_model
from sdtrain.models.model import Model
from sdtrain.training.watching.records import NoteRecord

Train = Callable[..., tuple[Path, str]]
SIDE_PX = 192


@pytest.fixture(scope="module")
def model() -> Model:
    config = ModelConfig(path="builtin:tiny-sdxl")
    return load_model(
        open_model(config, "model"), config, device=torch.device("cpu"), dtype=torch.float32, caption_chunks=1
    )


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """A memory that holds what the VAE makes of a tile at once, and no more; returns the widths that fitted."""

    def limit(tile_px: int, *, encodes: bool = True, decodes: bool = True) -> list[int]:
        monkeypatch.setattr(tiles, "TILE_PX", tile_px)
        fitted: list[int] = []

        def limited(forward: Callable[..., Tensor], widest: int) -> Callable[..., Tensor]:
            def call(self: Any, there: Tensor, *rest: Any) -> Tensor:
                if there.shape[-1] > widest:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                fitted.append(there.shape[-1])
                return forward(self, there, *rest)

            return call

        from diffusers.models.autoencoders.vae import Decoder, Encoder

        if encodes:
            monkeypatch.setattr(Encoder, "forward", limited(Encoder.forward, tile_px))
        if decodes:
            monkeypatch.setattr(Decoder, "forward", limited(Decoder.forward, tile_px // 8))
        return fitted

    return limit


def smooth_picture() -> Tensor:
    """A disc that fades out, (1, 3, h, w) in [-1, 1]."""
    place = torch.linspace(-1, 1, SIDE_PX)
    disc = torch.exp(-2 * (place[:, None] ** 2 + place[None] ** 2))
    return torch.stack([disc, 1 - disc, disc * 0.5])[None] * 2 - 1


def test_in_tiles_a_picture_becomes_nearly_the_latents_that_it_becomes_as_a_whole(
    model: Model, small_memory: Callable[..., list[int]]
) -> None:
    pixels, tiled = smooth_picture(), set[tiles.InTiles]()
    vae: Any = model.components.vae  # type: ignore[attr-defined]
    whole = latent_diffusion.encode_pixels(vae, pixels, tiled)
    drawn = latent_diffusion.decode_latents(vae, whole, torch.nn.Linear(1, 1), tiled)
    assert not tiled
    before = vae.tile_sample_min_size, vae.tile_latent_min_size, vae.use_tiling
    fitted = small_memory(64)
    in_parts = latent_diffusion.encode_pixels(vae, pixels, tiled)
    assert tiled == {"encoded"} and fitted and max(fitted) == 64
    assert in_parts.shape == whole.shape
    assert (in_parts - whole).std() < 0.3 * whole.std()
    again = latent_diffusion.decode_latents(vae, whole, torch.nn.Linear(1, 1), tiled)
    assert tiled == {"encoded", "decoded"} and again.shape == pixels.shape
    assert (again - drawn).std() < 0.2 * drawn.std()
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size, vae.use_tiling) == before


def test_what_does_not_fit_in_tiles_either_is_too_little_memory(
    model: Model, small_memory: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(64)
    monkeypatch.setattr(tiles, "TILE_PX", 128)
    vae: Any = model.components.vae  # type: ignore[attr-defined]
    with pytest.raises(torch.OutOfMemoryError):
        latent_diffusion.encode_pixels(vae, smooth_picture(), set())
    assert not vae.use_tiling


def test_a_run_says_once_that_it_encodes_and_decodes_in_tiles(
    train: Train, small_memory: Callable[..., list[int]], tmp_path: Path
) -> None:
    small_memory(64)
    notes: list[str] = []

    def watch(record: object) -> None:
        if isinstance(record, NoteRecord):
            notes.append(record.text)

    changes = {"data.cache": str(tmp_path / "fresh"), "preview.every": 1, "preview.seeds": [0], "steps": 2}
    run, said = train(changes, watchers=[watch])
    assert " ".join(said.split()).count(tiles.TOLD["encoded"]) == 1
    assert sum(tiles.TOLD["decoded"] in note for note in notes) == 1
    assert len(list((run / "previews").glob("step-*.png"))) == 3


def test_a_run_with_enough_memory_says_nothing_of_tiles(train: Train) -> None:
    _, said = train({"preview.every": 1, "preview.seeds": [0], "steps": 1})
    assert "tiles" not in said


def test_the_vae_is_one_that_can_be_tiled(model: Model) -> None:
    assert isinstance(model.components.vae, AutoencoderKL)  # type: ignore[attr-defined]
