"""Encodes what the cache lacks, once: each picture and each caption alone.

Alone, because the last bits of an encoding depend on how many are encoded together. So an entry follows from its
picture only, and a run on a cache that grew over many edits gives the same bits as a run that starts from nothing. A
single 1024 px picture keeps a GPU busy; memory stays that of one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sdtrain.data import cache as store
from sdtrain.data.buckets import Placement
from sdtrain.data.examples import Example, Progress, unreadable_problems
from sdtrain.data.identity.digests import picture_digests
from sdtrain.data.pictures import PictureError, measure
from sdtrain.data.pixels import load_pixels
from sdtrain.data.threads import map_ahead
from sdtrain.errors import UserError, user_error

Picture = tuple[Example, Placement]
T = TypeVar("T")
_CHANGED = "picture has changed while it was in use; start again"


def encode_pictures(
    pictures: Sequence[Picture],
    encode: Callable[[Tensor], Tensor],
    fingerprint: str,
    cache: Path,
    on_progress: Progress,
    *,
    digests: Sequence[bytes] | None = None,
    wrong: Sequence[tuple[Path, str]] = (),
) -> list[Path]:
    """Return the paths of the pictures' cache entries, in their order; entries missing or damaged are encoded first.

    `encode` takes (1, 3, H, W) and returns (1, c, h, w). digests: those of the pictures' files, None: they are read
    here. wrong: files that cannot be used and why, by what was looked at before. Raises UserError with these and all
    pictures that would have to be encoded and cannot be read, before any is encoded; also if an encoding is not finite,
    or if a picture is no longer what its digest was taken of.
    """
    digests = digests or picture_digests([example.path for example, _ in pictures], on_progress=on_progress)
    paths = [
        store.latents_path(cache, digest, placement, fingerprint)
        for (_, placement), digest in zip(pictures, digests, strict=True)
    ]
    digest_of = dict(zip(paths, digests, strict=True))
    missing = _missing(dict(zip(paths, pictures, strict=True)))
    _check(list(missing.values()), wrong, on_progress)
    loaded = map_ahead(_load, ((picture, digest_of[path]) for path, picture in missing.items()))
    for done, ((path, (example, _)), pixels) in enumerate(zip(missing.items(), loaded, strict=True), 1):
        _store(path, {"latents": encode(pixels[None])}, str(example.path), "VAE")
        on_progress("encoding pictures", done, len(missing))
    return paths


def encode_captions(
    captions: Sequence[str],
    encode: Callable[[list[str]], dict[str, Tensor]],
    fingerprint: str,
    cache: Path,
    on_progress: Progress,
) -> dict[str, Path]:
    """Return the path of each caption's cache entry; entries missing or damaged are encoded first, each caption once.

    `encode` takes one caption and returns named tensors with a leading dimension of 1.
    """
    paths = {caption: store.caption_path(cache, caption, fingerprint) for caption in captions}
    missing = _missing({path: caption for caption, path in paths.items()})
    for done, (path, caption) in enumerate(missing.items(), 1):
        _store(path, encode([caption]), f"caption {caption[:40]!r}", "text encoder")
        on_progress("encoding captions", done, len(missing))
    return paths


def _missing(wanted: dict[Path, T]) -> dict[Path, T]:
    """Return what is not in the cache or damaged there.

    Checksums are compared where the entries will be read into memory anyway.
    """
    thorough = store.num_bytes(wanted) <= store.HELD_BYTES
    return {path: thing for path, thing in wanted.items() if not store.is_whole(path, thorough=thorough)}


def _check(pictures: Sequence[Picture], before: Sequence[tuple[Path, str]], on_progress: Progress) -> None:
    """Raise UserError with all pictures that cannot be read or that are not what was scanned, and what was before."""

    def reason(picture: Picture) -> str:
        example, _ = picture
        try:
            size = measure(example.path, decode=True)
        except PictureError as error:
            return str(error)
        changed = size != (example.width_px, example.height_px)
        return _CHANGED if changed else ""

    wrong = list(before)
    for done, ((example, _), what) in enumerate(zip(pictures, map_ahead(reason, pictures), strict=True), 1):
        if what:
            wrong.append((example.path, what))
        on_progress("checking pictures", done, len(pictures))
    if wrong:
        raise UserError("data", unreadable_problems(wrong))


def _load(wanted: tuple[Picture, bytes]) -> Tensor:
    (example, placement), digest = wanted
    try:
        pixels = load_pixels(example, placement)
    except PictureError as error:
        raise user_error("data", str(example.path), str(error)) from error
    if picture_digests([example.path]) != [digest]:  # its latents would stand in the cache under another picture's name
        raise user_error("data", str(example.path), _CHANGED)
    return pixels


def _store(path: Path, encoded: Mapping[str, Tensor], thing: str, encoder: str) -> None:
    """Write the only row of each tensor. Raises UserError if a number is not finite: it would ruin every later run."""
    rows = {name: tensor[0].detach().to("cpu") for name, tensor in encoded.items()}
    if not all(torch.isfinite(row).all() for row in rows.values()):
        what = f"the {encoder} gives NaN or infinity for it; its weights are damaged or do not belong to this model"
        raise user_error("data", thing, what)
    store.write(path, rows)
