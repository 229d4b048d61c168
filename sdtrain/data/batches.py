"""The batches of every step, put together from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.config.schema import DataConfig
from sdtrain.data import cache as store
from sdtrain.data.buckets import Placement
from sdtrain.data.captions.drawing import Drawing
from sdtrain.data.encoding import Encoders
from sdtrain.data.entries.ahead import ReadAhead
from sdtrain.data.entries.needed import encode_needed, find_needed
from sdtrain.data.examples import Example
from sdtrain.data.identity.digests import picture_digests
from sdtrain.data.masks.encoding import mask_at
from sdtrain.data.order import Order, Piece, Plan
from sdtrain.data.placing import drawn_view
from sdtrain.errors import UserError
from sdtrain.files.progress import Progress


@dataclass(frozen=True)
class Batch:
    """One micro-batch: n pictures of one bucket, on the CPU."""

    index: int  # within the step, from 0
    pieces: tuple[Piece, ...]  # where its pictures stand in the plan of the step, which their draws follow from
    latents: Tensor  # (n, c, h, w) float32
    captions: tuple[str, ...]  # "" where dropped
    text: dict[str, Tensor] | None  # name -> (n, ...) float32; None: the loop encodes the captions itself
    sizes: dict[str, Tensor]  # name -> (n, ...), what a model is told of the pictures' sizes
    examples: tuple[Example, ...]
    weights: Tensor | None = None  # (n,) float32, factors on the pictures' errors in training; None: 1
    counts: Tensor | None = None  # (n, h, w) float32, how much each place counts in the loss; None: everywhere 1

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Where each picture stands in the plan of the step: its planned micro-batch, and which row of it."""
        return _rows_of(self.pieces)


@dataclass(frozen=True)
class _View:
    """One view of a picture, and where its latents and its mask lie."""

    example: Example
    placement: Placement
    latents: Path
    mask: Path | None


@dataclass(frozen=True)
class _Row:
    """One picture in all its views, ready to be batched."""

    example: Example
    views: tuple[_View, ...]


@dataclass(frozen=True)
class _Part:
    """All that a micro-batch is made of. views: of its pictures. share: of the step's pictures."""

    index: int
    pieces: tuple[Piece, ...]
    views: tuple[_View, ...]
    captions: tuple[str, ...]
    share: float


class Batches:
    """The micro-batches of every step: a pure function of (seed, step), whatever was asked for before.

    What is drawn for a picture does not depend on how many are computed at once either, see `order`.
    """

    def __init__(
        self,
        rows: Sequence[_Row],
        captions: Mapping[str, Path] | None,
        order: Order,
        *,
        encode_sizes: Callable[[Tensor], dict[str, Tensor]],
        drawing: Drawing,
        batch_size: int,
        pin: bool = False,
    ) -> None:
        """Hold the encodings in memory, or where they are too many read them ahead of each step.

        batch_size: the most pictures that are computed at once; of the planned micro-batches the order knows. pin:
        whether they are for a GPU: then batches are made ahead in any case, where it fetches them from faster.
        """
        self._rows, self._captions, self._order = rows, captions, order
        self._encode_sizes, self._drawing, self._batch_size = encode_sizes, drawing, batch_size
        views = [view for row in rows for view in row.views]
        paths = [*(one.latents for one in views), *(one.mask for one in views if one.mask), *(captions or {}).values()]
        self._entries = store.hold(paths, store.HELD_BYTES)
        self._ahead = None if self._entries.held and not pin else ReadAhead(self._batch)
        self._pins = pin

    @property
    def steps_per_epoch(self) -> float:
        """The number of steps in which every picture is seen `repeats` times; a step may reach into the next epoch."""
        return self._order.steps_per_epoch

    @property
    def num_examples(self) -> float:
        """The number of pictures in an epoch, repeats counted; a mean where parts of repeats are drawn."""
        return self._order.num_images

    def examples_at(self, step: int) -> list[Example]:
        """Return the pictures of a step, as often as each is in it."""
        return [self._rows[number].example for numbers in self._order.step(step) for number in numbers]

    def at(
        self, step: int, batch_size: int | None = None, *, hand: int = 0, hands: int = 1, in_step: bool = False
    ) -> Iterator[tuple[Batch, float]]:
        """Return the micro-batches of a step, each with its share of the step's pictures; the shares sum to 1.

        Steps are counted from 0. batch_size: the most pictures in a micro-batch, None for the run's setting. Whatever
        it is, a step has the same pictures with the same captions, and each the same draws; only the sum of their
        losses is rounded elsewhere. hand, hands: only what the process with this number computes, of so many that
        share the step, by the number of pixels; it may be nothing. in_step: whether all of them get as many, where one
        has fewer some that count nothing. Raises UserError if a cache entry was damaged or
        removed during the run.
        """
        parts = self._parts(step, batch_size, hand, hands, in_step)
        for number, part in enumerate(parts):
            if self._ahead is None:
                yield self._batch(part), part.share
            else:
                following = chain(parts[number + 1 :], self._lazily(step + 1, batch_size, hand, hands, in_step))
                yield self._ahead.get(part, following), part.share

    def close(self) -> None:
        """End the thread that reads ahead, if there is one; whoever asks for a step later begins another."""
        if self._ahead is not None:
            self._ahead.close()

    def _lazily(self, *which: Any) -> Iterator[_Part]:
        yield from self._parts(*which)

    def _parts(self, step: int, batch_size: int | None, hand: int, hands: int, in_step: bool) -> list[_Part]:
        """Return what the micro-batches of a step are made of; nothing is read for it."""
        planned = self._order.step(step)
        captions = [
            self._drawing.captions(step, index, [self._rows[number].example for number in numbers])
            for index, numbers in enumerate(planned)
        ]
        parts, _, dealt = self._order.dealt(step, batch_size or self._batch_size, hands)
        num, found = sum(map(len, planned)), []
        mine = dealt[hand] or (max(dealt, key=len)[:1] if in_step else [])
        for index in mine:
            places = _rows_of(parts[index])
            views = tuple(self._view(step, batch, place, planned[batch][place]) for batch, place in places)
            drawn = tuple(captions[batch][place] for batch, place in places)
            share = len(views) / num if dealt[hand] else 0.0
            found.append(_Part(index, tuple(parts[index]), views, drawn, share))
        if in_step:
            found += [replace(found[-1], share=0.0)] * (max(map(len, dealt)) - len(found))
        return found

    def _view(self, step: int, index: int, place: int, number: int) -> _View:
        views = self._rows[number].views
        return views[drawn_view(self._drawing.seed, step, index, place, len(views))]

    def _batch(self, part: _Part) -> Batch:
        """Return the micro-batch, a function of the part alone: it may be read in a thread, ahead of its use."""
        rows = part.views
        latents = torch.stack([self._entries.get(row.latents)["latents"] for row in rows]).to(torch.float32)
        sizes = torch.tensor([row.placement.sizes() for row in rows], dtype=torch.float32)
        text = self._text(part.captions)
        if self._pins:
            latents = latents.pin_memory()
            text = text and {name: tensor.pin_memory() for name, tensor in text.items()}
        return Batch(
            index=part.index,
            pieces=part.pieces,
            latents=latents,
            captions=part.captions,
            text=text,
            sizes=self._encode_sizes(sizes),
            examples=tuple(row.example for row in rows),
            weights=_weights([row.example.loss_weight for row in rows]),
            counts=self._counts(rows, (latents.shape[-2], latents.shape[-1])),
        )

    def _counts(self, rows: Sequence[_View], size: tuple[int, int]) -> Tensor | None:
        """How much each place of the pictures counts, by their masks; None where none has one."""
        if not any(row.mask for row in rows):
            return None
        return torch.stack(
            [
                mask_at(self._entries.get(row.mask)["mask"], row.example.mask.floor, size)
                if row.mask and row.example.mask
                else torch.ones(size)
                for row in rows
            ]
        )

    def _text(self, captions: Sequence[str]) -> dict[str, Tensor] | None:
        if self._captions is None:
            return None
        encoded = [self._entries.get(self._captions[caption]) for caption in captions]
        return {name: torch.stack([one[name] for one in encoded]).to(torch.float32) for name in sorted(encoded[0])}


def _rows_of(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    return [(piece.index, row) for piece in pieces for row in range(piece.start, piece.stop)]


def _weights(weights: Sequence[float]) -> Tensor | None:
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights, dtype=torch.float32)


def encode_share(
    config: DataConfig,
    examples: Sequence[Example],
    encoders: Encoders,
    *,
    cache: Path,
    on_progress: Progress,
    digests: Sequence[bytes],
    hand: int,
    hands: int,
) -> None:
    """Encode what this process does of what the cache lacks, of so many that fill it together; see `prepare_batches`.

    Whatever is wrong with a picture or the cache is left to who prepares the batches, and finds it again.
    """
    with suppress(UserError):
        needed = find_needed(config, examples, digests, encoders, cache)
        encode_needed(needed.share(hand, hands), encoders, cache, on_progress)


def prepare_batches(
    config: DataConfig,
    examples: Sequence[Example],
    encoders: Encoders,
    *,
    cache: Path,
    seed: int,
    on_progress: Progress,
    plan: Plan | None = None,
    digests: Sequence[bytes] | None = None,
    verify: bool = False,
    pin: bool = False,
) -> Batches:
    """Encode what the cache folder lacks and return the batches, in which `examples` are numbered as they stand.

    plan: how they are dealt out to steps; None: as the settings say, from step 0. digests: those of the pictures'
    files, by `picture_digests`; None: they are read here. verify: whether all that is cached is compared with its
    checksum. pin: see `Batches`.
    `on_progress(what, done, total)` is called from the calling thread. Raises UserError with all pictures that must
    be encoded and cannot be read, before any is encoded; also if an encoding is not finite or the cache cannot be
    written.
    """
    digests = digests or picture_digests([example.path for example in examples], on_progress=on_progress)
    needed = find_needed(config, examples, digests, encoders, cache)
    plan = plan or Plan(config.batch_size, config.gradient_accumulation)
    order = Order(
        [those[0].bucket for those in needed.views],
        [example.repeats for example in examples],
        batch_size=plan.batch_size,
        accumulation=plan.accumulation,
        seed=seed,
        start=plan.start,
    )
    encode_needed(needed, encoders, cache, on_progress, verify=verify)
    placed = zip(needed.pictures, needed.latents, needed.masks, strict=True)
    found = iter([_View(*picture, path, mask.path if mask else None) for picture, path, mask in placed])
    rows = [_Row(one, tuple(islice(found, len(those)))) for one, those in zip(examples, needed.views, strict=True)]
    return Batches(
        rows,
        needed.captions,
        order,
        encode_sizes=encoders.sizes,
        drawing=Drawing(seed, config.caption_dropout, needed.variants),
        batch_size=config.batch_size,
        pin=pin,
    )
