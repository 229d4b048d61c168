"""Masks in the cache, beside the latents of their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdtrain.data import cache as store
from sdtrain.data.buckets import Placement
from sdtrain.data.examples import Example
from sdtrain.data.identity.digests import mask_digests, picture_digests
from sdtrain.data.masks.area import at_latent_size
from sdtrain.data.masks.mask import Mask, mask_levels, nothing_left
from sdtrain.data.pictures import PictureError
from sdtrain.data.threads import map_ahead
from sdtrain.files.progress import Progress

Wrong = list[tuple[Path, str]]
_Wanted = tuple[Mask, Placement, bytes]


@dataclass(frozen=True)
class MaskEntry:
    """Where a picture's mask lies in the cache, and the digest of the file that it is made of."""

    path: Path
    digest: bytes


def mask_entries(
    pictures: Sequence[tuple[Example, Placement]], digests: Sequence[bytes], cache: Path
) -> list[MaskEntry | None]:
    """Return the entries of the pictures' masks, whether they are there or not; None where one has no mask.

    digests: of the pictures' files. Raises UserError for a mask that cannot be read.
    """
    digest_of = mask_digests([example.mask for example, _ in pictures if example.mask])
    entries: list[MaskEntry | None] = []
    for (example, placement), digest in zip(pictures, digests, strict=True):
        mask = example.mask
        if mask is None:
            entries.append(None)
            continue
        content = digest if mask.is_alpha else digest_of[mask.path]
        entries.append(MaskEntry(store.mask_path(cache, content, placement, is_alpha=mask.is_alpha), content))
    return entries


def encode_masks(
    pictures: Sequence[tuple[Example, Placement]], entries: Sequence[MaskEntry | None], on_progress: Progress
) -> Wrong:
    """Write the pictures' masks that the cache lacks; return what cannot be used.

    entries: by `mask_entries`. Raises UserError if the cache cannot be written.
    """
    missing: dict[Path, _Wanted] = {}
    for (example, placement), entry in zip(pictures, entries, strict=True):
        if example.mask is not None and entry is not None and not store.is_whole(entry.path, thorough=True):
            missing[entry.path] = example.mask, placement, entry.digest
    wrong: Wrong = []
    for done, (path, found) in enumerate(zip(missing, map_ahead(_encoded, missing.values()), strict=True), 1):
        if isinstance(found, str):
            wrong.append((missing[path][0].path, found))
        else:
            store.write(path, {"mask": found})
        on_progress("reading masks", done, len(missing))
    return wrong


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
        return nothing_left(placement)
    return torch.ones(1, 1) if bool((area == 1).all()) else area
