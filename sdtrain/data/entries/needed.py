"""Which entries of the cache examples need, and encoding those that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sdtrain.config.schema import DataConfig
from sdtrain.data import cache as store
from sdtrain.data.captions.drawing import captions_to_encode, variants_of
from sdtrain.data.captions.wording import Varied
from sdtrain.data.encoding import Encoders, Picture, encode_captions, encode_pictures
from sdtrain.data.examples import Example, Progress
from sdtrain.data.placing import placements_of


@dataclass(frozen=True)
class Needed:
    """Where the encodings of examples lie.

    pictures and latents: in the order of the examples. captions: every text that a step may draw; None: the training
    loop encodes captions itself. variants: see `Drawing`.
    """

    pictures: list[Picture]
    latents: list[Path]
    captions: dict[str, Path] | None
    variants: dict[Varied, tuple[str, ...]]

    def paths(self) -> set[Path]:
        """Return the paths of all entries, each once."""
        return {*self.latents, *(self.captions or {}).values()}


def find_needed(
    config: DataConfig, examples: Sequence[Example], digests: Sequence[bytes], encoders: Encoders, cache: Path
) -> Needed:
    """Return the entries that examples need, whether they are there or not; nothing is read.

    digests: those of the pictures' files, by `picture_digests`.
    """
    pictures = list(zip(examples, placements_of(examples, config), strict=True))
    latents = [
        store.latents_path(cache, digest, placement, encoders.vae_fingerprint)
        for (_, placement), digest in zip(pictures, digests, strict=True)
    ]
    if encoders.captions is None:
        return Needed(pictures, latents, None, {})
    variants = variants_of(examples, config.caption_variants)
    captions = captions_to_encode(examples, variants, config.caption_dropout)
    paths = {caption: store.caption_path(cache, caption, encoders.text_fingerprint) for caption in captions}
    return Needed(pictures, latents, paths, variants)


@torch.no_grad()
def encode_needed(
    needed: Needed,
    digests: Sequence[bytes],
    encoders: Encoders,
    cache: Path,
    on_progress: Progress,
    *,
    verify: bool = False,
) -> None:
    """Encode what the cache lacks of the entries that are needed. verify and errors: see `encode_pictures`."""
    fingerprint = encoders.vae_fingerprint
    encode_pictures(needed.pictures, encoders.pixels, fingerprint, cache, on_progress, digests=digests, verify=verify)
    if encoders.captions is not None:
        captions = list(needed.captions or {})
        encode_captions(captions, encoders.captions, encoders.text_fingerprint, cache, on_progress, verify=verify)
