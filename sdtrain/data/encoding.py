"""Encodes what the cache lacks, once: each picture and each caption alone.

Alone, because the last bits of an encoding depend on how many are encoded together. So an entry follows from its
picture only, and a run on a cache that grew over many edits gives the same bits as a run that starts from nothing. A
single 1024 px picture keeps a GPU busy; memory stays that of one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sdtrain.data import cache as store
from sdtrain.data.buckets import Placement
from sdtrain.data.examples import Example, unreadable_problems
from sdtrain.data.identity.digests import content_digest
from sdtrain.data.pictures import PictureError, read_whole
from sdtrain.data.pixels import load_pixels
from sdtrain.data.threads import map_ahead
from sdtrain.errors import UserError, user_error
from sdtrain.files.progress import Progress

Picture = tuple[Example, Placement]
T = TypeVar("T")
_CHANGED = "picture has changed while it was in use; start again"


@dataclass(frozen=True)
class Encoders:
    """What turns pictures and captions into what is trained on; handed in, so that no model is seen here.

    `pixels` and `captions` are called with one thing at a time, on the CPU, and may return tensors on any device
    and in any dtype. They must not draw from random generators: what they return is cached. The fingerprints name
    the weights that they use.
    """

    pixels: Callable[[Tensor], Tensor]  # (n, 3, H, W) float32 in [-1, 1] -> latents (n, c, h, w), scaled for the U-Net
    captions: Callable[[list[str]], dict[str, Tensor]] | None  # None: the training loop encodes captions itself
    vae_fingerprint: str
    text_fingerprint: str
    sizes: Callable[[Tensor], dict[str, Tensor]]
    """Maps sizes (n, 6), float32, in the order of `Placement.sizes`, to the tensors that a model is told of them."""


def encode_pictures(
    pictures: Sequence[Picture],
    encode: Callable[[Tensor], Tensor],
    fingerprint: str,
    cache: Path,
    on_progress: Progress,
    *,
    digests: Sequence[bytes],
    wrong: Sequence[tuple[Path, str]] = (),
    verify: bool = False,
) -> list[Path]:
    """Return the paths of the pictures' cache entries, in their order; entries missing or damaged are encoded first.

    `encode` takes (1, 3, H, W) and returns (1, c, h, w). digests: those of the pictures' files. wrong: files that
    cannot be used and why, by what was looked at before. verify: whether every byte of every entry is compared with its
    checksum, however many there are. Each picture is read once and decoded once. Raises UserError with these and all
    pictures that would have to be encoded and cannot be read, or are no longer what their digest was taken of; what was
    encoded before the first of them stays in the cache, and after it no more is. Also if an encoding is not finite.
    """
    paths = [
        store.latents_path(cache, digest, placement, fingerprint)
        for (_, placement), digest in zip(pictures, digests, strict=True)
    ]
    digest_of = dict(zip(paths, digests, strict=True))
    missing = _missing(dict(zip(paths, pictures, strict=True)), verify, on_progress)
    wrong = list(wrong)
    loaded = map_ahead(_load, ((picture, digest_of[path]) for path, picture in missing.items()))
    for done, ((path, (example, _)), pixels) in enumerate(zip(missing.items(), loaded, strict=True), 1):
        if isinstance(pixels, PictureError):
            wrong.append((example.path, str(pixels)))
        elif not wrong:
            _store(path, {"latents": encode(pixels[None])}, str(example.path), "VAE")
        on_progress("checking the other pictures" if wrong else "encoding pictures", done, len(missing))
    if wrong:
        raise UserError("data", unreadable_problems(wrong))
    return paths


def encode_captions(
    captions: Sequence[str],
    encode: Callable[[list[str]], dict[str, Tensor]],
    fingerprint: str,
    cache: Path,
    on_progress: Progress,
    *,
    verify: bool = False,
) -> dict[str, Path]:
    """Return the path of each caption's cache entry; entries missing or damaged are encoded first, each caption once.

    `encode` takes one caption and returns named tensors with a leading dimension of 1. verify: see `encode_pictures`.
    """
    paths = {caption: store.caption_path(cache, caption, fingerprint) for caption in captions}
    missing = _missing({path: caption for caption, path in paths.items()}, verify, on_progress)
    for done, (path, caption) in enumerate(missing.items(), 1):
        _store(path, encode([caption]), f"caption {caption[:40]!r}", "text encoder")
        on_progress("encoding captions", done, len(missing))
    return paths


def _missing(wanted: dict[Path, T], verify: bool, on_progress: Progress) -> dict[Path, T]:
    """Return what is not in the cache or damaged there.

    Checksums are compared where it is asked for, and where the entries will be read into memory anyway.
    """
    thorough = verify or store.num_bytes(wanted) <= store.HELD_BYTES
    missing = {}
    for done, (path, thing) in enumerate(wanted.items(), 1):
        if not store.is_whole(path, thorough=thorough):
            missing[path] = thing
        on_progress("looking at the cache", done, len(wanted))
    return missing


def _load(wanted: tuple[Picture, bytes]) -> Tensor | PictureError:
    """Return the pixels of a picture, or why there are none.

    The bytes that are decoded are those whose digest names the entry, whatever becomes of the file meanwhile.
    """
    (example, placement), digest = wanted
    try:
        content = read_whole(example.path)
        if content_digest(content) != digest:
            return PictureError(_CHANGED)
        return load_pixels(example, placement, content)
    except PictureError as error:
        return error


def _store(path: Path, encoded: Mapping[str, Tensor], thing: str, encoder: str) -> None:
    """Write the only row of each tensor. Raises UserError if a number is not finite: it would ruin every later run."""
    rows = {name: tensor[0].detach().to("cpu") for name, tensor in encoded.items()}
    if not all(torch.isfinite(row).all() for row in rows.values()):
        what = f"the {encoder} gives NaN or infinity for it; its weights are damaged or do not belong to this model"
        raise user_error("data", thing, what)
    store.write(path, rows)
