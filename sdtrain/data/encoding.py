"""Encoding what the cache lacks, once: each picture and each caption alone.

Alone, because the last bits of an encoding depend on how many are encoded together. So an entry follows from its
picture only, and a run on a cache that grew over many edits gives the same bits as a run that starts from nothing.
A single 1024 px picture keeps a GPU busy; memory stays that of one picture.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sdtrain.data import cache as store
from sdtrain.data.buckets import Placement
from sdtrain.data.examples import Example, unreadable_problems
from sdtrain.data.pictures import PictureError, measure
from sdtrain.data.pixels import load_pixels
from sdtrain.errors import UserError, user_error

Picture = tuple[Example, Placement]
Progress = Callable[[str, int, int], None]
T = TypeVar("T")
R = TypeVar("R")

_NUM_THREADS = min(8, os.cpu_count() or 1)


def encode_pictures(
    pictures: Sequence[Picture],
    encode: Callable[[Tensor], Tensor],
    fingerprint: str,
    cache: Path,
    on_progress: Progress,
) -> list[Path]:
    """The cache entries of the pictures, in their order; those that were missing or damaged are encoded.

    `encode` takes (1, 3, H, W) and returns (1, c, h, w). Raises UserError with all pictures that would have to be
    encoded and cannot be read, before any is encoded; and if an encoding is not finite.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        digests = _ahead(threads, lambda picture: _file_digest(picture[0].path), pictures)
        paths: list[Path] = []
        for (_, placement), digest in zip(pictures, digests, strict=True):
            paths.append(store.latents_path(cache, digest, placement, fingerprint))
            on_progress("reading pictures", len(paths), len(pictures))
        missing = _missing(dict(zip(paths, pictures, strict=True)))
        _check(threads, list(missing.values()), on_progress)
        loaded = _ahead(threads, _load, missing.values())
        for done, ((path, (example, _)), pixels) in enumerate(zip(missing.items(), loaded, strict=True), 1):
            latents = _to_disk_form(encode(pixels[None])[0])
            _refuse_not_finite(latents, example.path)
            store.write(path, {"latents": latents})
            on_progress("encoding pictures", done, len(missing))
    return paths


def encode_captions(
    captions: Sequence[str],
    encode: Callable[[list[str]], dict[str, Tensor]],
    fingerprint: str,
    cache: Path,
    on_progress: Progress,
) -> dict[str, Path]:
    """The cache entry of each caption; those that were missing or damaged are encoded, each one once.

    `encode` takes one caption and returns named tensors with a leading dimension of 1.
    """
    paths = {caption: store.caption_path(cache, caption, fingerprint) for caption in captions}
    missing = _missing({path: caption for caption, path in paths.items()})
    for done, (path, caption) in enumerate(missing.items(), 1):
        encoded = {name: _to_disk_form(tensor[0]) for name, tensor in encode([caption]).items()}
        store.write(path, encoded)
        on_progress("encoding captions", done, len(missing))
    return paths


def _missing(wanted: dict[Path, T]) -> dict[Path, T]:
    """What is not in the cache or damaged there. Checksums are checked where the entries will be read into memory."""
    thorough = store.num_bytes(wanted) <= store.HELD_BYTES
    return {path: thing for path, thing in wanted.items() if not store.is_whole(path, thorough=thorough)}


def _check(threads: ThreadPoolExecutor, pictures: Sequence[Picture], on_progress: Progress) -> None:
    """Raises UserError with all pictures that cannot be read or that are not what was scanned."""

    def reason(picture: Picture) -> str:
        example, _ = picture
        try:
            size = measure(example.path, decode=True)
        except PictureError as error:
            return str(error)
        changed = size != (example.width_px, example.height_px)
        return "picture has changed while it was in use; start again" if changed else ""

    wrong: list[tuple[Path, str]] = []
    for done, ((example, _), what) in enumerate(zip(pictures, _ahead(threads, reason, pictures), strict=True), 1):
        if what:
            wrong.append((example.path, what))
        on_progress("checking pictures", done, len(pictures))
    if wrong:
        raise UserError("data", unreadable_problems(wrong))


def _load(picture: Picture) -> Tensor:
    example, placement = picture
    try:
        return load_pixels(example, placement)
    except PictureError as error:
        raise user_error("data", str(example.path), str(error)) from error


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError as error:
        raise user_error("data", str(path), f"picture cannot be read: {error.strerror or error}") from error


def _refuse_not_finite(latents: Tensor, picture: Path) -> None:
    if not torch.isfinite(latents).all():
        what = (
            "the VAE gives NaN or infinity for this picture; in half precision SDXL's own VAE does that: "
            "use one that is made for it (model.vae), or bfloat16 or float32"
        )
        raise user_error("data", str(picture), what)


def _to_disk_form(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _ahead(threads: ThreadPoolExecutor, function: Callable[[T], R], things: Iterable[T]) -> Iterator[R]:
    """The results in order, computed by threads a little ahead of their use: memory holds a few, not all."""
    waiting: deque[Future[R]] = deque()
    for thing in things:
        waiting.append(threads.submit(function, thing))
        if len(waiting) > 2 * _NUM_THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
