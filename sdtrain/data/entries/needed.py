"""Which entries of the cache examples need, and encoding those that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdtrain.config.schema import DataConfig
from sdtrain.data import cache as store
from sdtrain.data.buckets import Placement
from sdtrain.data.captions.drawing import captions_to_encode, variants_of
from sdtrain.data.captions.wording import Varied
from sdtrain.data.encoding import Encoders, Picture, encode_captions, encode_pictures
from sdtrain.data.examples import Example
from sdtrain.data.masks.encoding import MaskEntry, encode_masks, mask_entries
from sdtrain.data.placing import placements_of, views_of
from sdtrain.files.progress import Progress


@dataclass(frozen=True)
class Needed:
    """Where the encodings of examples lie.

    views: those of each example. pictures, digests, latents and masks: of every view of every example in their order;
    a mask is None where all of a picture counts. captions: every text that a step may draw; None: the training loop
    encodes captions itself. variants: see `Drawing`.
    """

    views: list[tuple[Placement, ...]]
    pictures: list[Picture]
    digests: list[bytes]
    latents: list[Path]
    masks: list[MaskEntry | None]
    captions: dict[str, Path] | None
    variants: dict[Varied, tuple[str, ...]]

    def share(self, hand: int, hands: int) -> Needed:
        """Return what the process with this number encodes, of so many that each encode a part; nothing is left out.

        It follows from the order alone, not from what the cache has, which others are filling meanwhile.
        """
        captions = None if self.captions is None else dict(list(self.captions.items())[hand::hands])
        rows = slice(hand, None, hands)
        return replace(
            self,
            pictures=self.pictures[rows],
            digests=self.digests[rows],
            latents=self.latents[rows],
            masks=self.masks[rows],
            captions=captions,
        )

    def paths(self) -> set[Path]:
        """Return the paths of all entries, each once."""
        return {*self.latents, *(mask.path for mask in self.masks if mask), *(self.captions or {}).values()}


def find_needed(
    config: DataConfig, examples: Sequence[Example], digests: Sequence[bytes], encoders: Encoders, cache: Path
) -> Needed:
    """Return the entries that examples need, whether they are there or not; no picture is read, only masks.

    digests: those of the pictures' files, by `picture_digests`. Raises UserError for a mask that cannot be read.
    """
    views = [views_of(*one) for one in zip(examples, placements_of(examples, config), strict=True)]
    pictures = [(example, view) for example, those in zip(examples, views, strict=True) for view in those]
    of_views = [digest for digest, those in zip(digests, views, strict=True) for _ in those]
    latents = [
        store.latents_path(cache, digest, placement, encoders.vae_fingerprint)
        for (_, placement), digest in zip(pictures, of_views, strict=True)
    ]
    places = (views, pictures, of_views, latents, mask_entries(pictures, of_views, cache))
    if encoders.captions is None:
        return Needed(*places, None, {})
    variants = variants_of(examples, config.caption_variants)
    captions = captions_to_encode(examples, variants, config.caption_dropout)
    paths = {caption: store.caption_path(cache, caption, encoders.text_fingerprint) for caption in captions}
    return Needed(*places, paths, variants)


@torch.no_grad()
def encode_needed(
    needed: Needed,
    encoders: Encoders,
    cache: Path,
    on_progress: Progress,
    *,
    verify: bool = False,
) -> None:
    """Encode what the cache lacks of the entries that are needed. verify and errors: see `encode_pictures`."""
    wrong = encode_masks(needed.pictures, needed.masks, on_progress)
    encode_pictures(
        *(needed.pictures, encoders.pixels, encoders.vae_fingerprint, cache, on_progress),
        digests=needed.digests,
        wrong=wrong,
        verify=verify,
    )
    if encoders.captions is not None:
        captions = list(needed.captions or {})
        encode_captions(captions, encoders.captions, encoders.text_fingerprint, cache, on_progress, verify=verify)
