"""A VAE that works tile by tile, where a whole picture does not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

TILE_PX = 512
"""The sides of a tile. Neighbours overlap by a quarter of it, in which one fades into the other."""

InTiles = Literal["encoded", "decoded"]
TOLD: dict[InTiles, str] = {
    "encoded": "too little memory to encode whole pictures: some were encoded in tiles, which changes them a little",
    "decoded": "too little memory to decode whole pictures: they are decoded in tiles, which changes them a little",
}
"""What a person is told of it."""


@contextmanager
def in_tiles(vae: Any) -> Iterator[None]:
    """Let a VAE of diffusers encode and decode in tiles; afterwards it works on whole pictures, as before."""
    before = vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.tile_sample_min_size = TILE_PX
    vae.tile_latent_min_size = TILE_PX // 2 ** (len(vae.config.block_out_channels) - 1)
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = before
