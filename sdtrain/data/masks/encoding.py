"""Masks in the cache, beside the latents of their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sdtrain.data import cache as store
from sdtrain.data.buckets import Placement
from sdtrain.data.examples import Example, Progress
from sdtrain.data.identity.digests import mask_digests, picture_digests
from sdtrain.data.masks.area import at_latent_size
from sdtrain.data.masks.mask import Mask, mask_levels
from sdtrain.data.pictures import PictureError
from sdtrain.data.threads import map_ahead

Wrong = list[tuple[Path, str]]
_Wanted = tuple[Mask, Placement, bytes]


def encode_masks(
    pictures: Sequence[tuple[Example, Placement]], digests: Sequence[bytes], cache: Path, on_progress: Progress
) -> tuple[list[Path | None], Wrong]:
    """Return the paths of the pictures' masks in the cache, None where one has no mask, and what cannot be used.

    What the cache lacks is written. digests: of the pictures' files. Raises UserError if the cache cannot be written.
    """
    digest_of = mask_digests([example.mask for example, _ in pictures if example.mask])
    paths: list[Path | None] = []
    missing: dict[Path, _Wanted] = {}
    for (example, placement), digest in zip(pictures, digests, strict=True):
        mask = example.mask
        if mask is None:
            paths.append(None)
            continue
        content = digest if mask.is_alpha else digest_of[mask.path]
        path = store.mask_path(cache, content, placement, is_alpha=mask.is_alpha)
        paths.append(path)
        if not store.is_whole(path, thorough=True):
            missing[path] = mask, placement, content
    wrong: Wrong = []
    for done, (path, found) in enumerate(zip(missing, map_ahead(_encoded, missing.values()), strict=True), 1):
        if isinstance(found, str):
            wrong.append((missing[path][0].path, found))
        else:
            store.write(path, {"mask": found})
        on_progress("reading masks", done, len(missing))
    return paths, wrong


def mask_at(entry: Tensor, floor: float, size: tuple[int, int]) -> Tensor:
    """Return how much each latent pixel counts, (h, w) of that size: what the cache says, but floor at least."""
    return entry.clamp(min=floor).expand(size)


def _encoded(wanted: _Wanted) -> Tensor | str:
    """A mask at latent size, (1, 1) where all of it counts; or the reason why it cannot be used."""
    mask, placement, digest = wanted
    try:
        levels = mask_levels(mask)
    except PictureError as error:
        return str(error)
    if levels.shape[::-1] != placement.original or picture_digests([mask.path]) != [digest]:
        return "mask has changed while it was in use; start again"
    area = at_latent_size(levels, placement)
    if not area.any():
        size, corner = "{}x{}".format(*placement.bucket), f"{placement.crop_left},{placement.crop_top}"
        return f"leaves nothing of what is cropped to {size} from {corner}; mend or remove it, or crop the picture less"
    return torch.ones(1, 1) if bool((area == 1).all()) else area
