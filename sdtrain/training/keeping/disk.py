"""Whether a disk has room for what is going to be written, told in one sentence with numbers. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdtrain.config.schema import Config
from sdtrain.data.examples import Example
from sdtrain.errors import user_error

LATENT_BYTES_PER_PIXEL = 4 * 4 / 64
"""Four channels in float32, one latent for 8 x 8 pixels."""
MASK_BYTES_PER_PIXEL = 4 / 64
CONDITIONING_BYTES = 77 * 2048 * 4
"""Of one chunk of a caption, in float32: the most that a family has."""


def require(folder: Path, setting: str, needed: Mapping[str, int]) -> None:
    """Raise UserError, naming the setting that chose the folder, unless there is room for these bytes, by what for."""
    there = folder
    while not there.exists():
        there = there.parent
    free, total = shutil.disk_usage(there).free, sum(needed.values())
    if total > free:
        parts = ", ".join(f"{size(num_bytes)} for {what}" for what, num_bytes in needed.items() if num_bytes)
        what = f"this run needs {size(total)} on the disk of {there} ({parts}), and {size(free)} are free"
        raise user_error("disk space", setting, f"{what}; make room or choose another folder")


def size(num_bytes: int) -> str:
    """Return a number of bytes in words."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def require_cache_room(cache: Path, config: Config, examples: Sequence[Example]) -> None:
    """Raise UserError unless there is room for the encodings that the cache lacks, as far as that can be told yet.

    An entry that is there counts, whoever's it is, so that a run whose cache is complete is never refused.
    """
    require(cache, "data.cache", cache_needed(cache, config, examples))


def cache_needed(cache: Path, config: Config, examples: Sequence[Example]) -> dict[str, int]:
    """Return about how many bytes the encodings take that a cache lacks, by what for."""
    captions = {example.caption for example in examples}
    views = [example for example in examples for _ in range(example.crops * (1 + example.flip))]
    pictures = _missing(cache / "latents", len(views))  # each view counts as a picture
    masks = _missing(cache / "masks", sum(example.mask is not None for example in views))
    area = max((example.resolution_px or config.data.resolution_px) ** 2 for example in examples) if examples else 0
    return {
        f"the latents of {pictures} pictures": int(pictures * area * LATENT_BYTES_PER_PIXEL),
        f"{masks} masks": int(masks * area * MASK_BYTES_PER_PIXEL),
        "captions": _missing(cache / "captions", len(captions)) * config.data.caption_chunks * CONDITIONING_BYTES,
    }


def _missing(folder: Path, wanted: int) -> int:
    return max(0, wanted - sum(1 for _ in folder.glob("*/*.safetensors")))
