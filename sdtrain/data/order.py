"""Which pictures each step sees: a function of (seed, step) only, so that resuming needs no position in the data.

A step is planned as micro-batches, and what is drawn for a picture (noise, timestep, whether its caption is dropped)
is a function of its place in that plan. How many of them are computed at once is another matter: `split` cuts or joins
the planned micro-batches, and every picture keeps its draws.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from random import Random

from sdtrain.data.counts import Counts, stream

_EPOCHS = 16
"""So many first epochs stand for all where they differ in length."""


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of planned micro-batch `index` of a step, whose `total` rows are drawn together."""

    index: int
    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class Start:
    """Where an order begins that takes over from one of other pictures, in the middle of an epoch.

    left: how often each picture is still seen in that epoch; below 0 where it was seen more often than its folder says
    by now, which counts if the folder is changed once more.
    """

    step: int
    epoch: int
    left: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How the pictures are dealt out to steps, as it was settled when a run began, whatever is computed at once later.

    start: where the order of these pictures begins; None: at step 0.
    """

    batch_size: int
    accumulation: int
    start: Start | None = None


class Order:
    """The endless row of micro-batches, epoch after epoch; each step takes the next `accumulation` of them.

    Within an epoch every picture is there exactly `repeats` times, or the next whole number below or above it (see
    `Counts`), no micro-batch mixes buckets, the last one of a
    bucket may be smaller, and those of all buckets are shuffled together. Pictures are numbered as they were handed in.
    The only state is the epoch that was drawn last, which saves drawing it again at every step.
    """

    def __init__(
        self,
        buckets: Sequence[tuple[int, int]],
        repeats: Sequence[float],
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        start: Start | None = None,
    ) -> None:
        """start: where the order begins; None: at step 0, with a whole epoch."""
        self.buckets, self._counts = tuple(buckets), Counts(repeats, seed)
        self.batch_size, self._accumulation, self._seed = batch_size, accumulation, seed
        self._start, self._has_taken_over = start or Start(0, 0, self._counts.at(0)), start is not None
        self._last: tuple[int, list[tuple[int, ...]]] | None = None
        self._whole = Counter[tuple[int, int]]()
        for bucket, times in zip(self.buckets, self._counts.whole, strict=True):
            self._whole[bucket] += times
        self._ends: list[int] = []  # where each epoch after the first one ends, as far as they were asked for
        self.num_images = sum(repeats)  # on average, as the next one
        self.batches_per_epoch: float = self._num_batches_of(0)
        if self._counts.are_drawn:
            self.batches_per_epoch = sum(map(self._num_batches_of, range(_EPOCHS))) / _EPOCHS
        self._in_first_epoch = self._num_batches(self._start.left)
        if not self.num_images:
            raise ValueError("no pictures to order")

    @property
    def steps_per_epoch(self) -> float:
        return self.batches_per_epoch / self._accumulation

    def step(self, step: int) -> list[tuple[int, ...]]:
        """Return the micro-batches of a step; a picture is named by its number."""
        places = [self._place(step, index) for index in range(self._accumulation)]
        return [self.epoch(epoch)[position] for epoch, position in places]

    def dealt(
        self, step: int, batch_size: int, hands: int
    ) -> tuple[list[tuple[Piece, ...]], list[int], list[list[int]]]:
        """Return the micro-batches of a step as they are computed, how many pixels each has, and which of them each of
        `hands` processes computes.

        batch_size: the most pictures in one, unless the processes can share the step only in smaller ones.
        """
        planned = self.step(step)
        buckets, sizes = [self.buckets[numbers[0]] for numbers in planned], [len(numbers) for numbers in planned]
        most = min(batch_size, -(-sum(sizes) // hands)) if hands > 1 else batch_size
        parts = split(sizes, buckets, self.batch_size, most)
        pixels = [sum((piece.stop - piece.start) * prod(buckets[piece.index]) for piece in part) for part in parts]
        return parts, pixels, deal(pixels, hands)

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """Return all micro-batches of an epoch in the order in which they are seen."""
        if self._last is None or self._last[0] != epoch:
            if self._has_taken_over and epoch == self._start.epoch:
                random = stream(self._seed, "order", epoch, "from", self._start.step)
                self._last = (epoch, self._draw(random, self._start.left))
            else:
                self._last = (epoch, self._draw(stream(self._seed, "order", epoch), self._counts.at(epoch)))
        return self._last[1]

    def counts(self, epoch: int) -> tuple[int, ...]:
        """Return how often each picture is seen in a whole epoch."""
        return self._counts.at(epoch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a step begins in."""
        return self._place(step, 0)[0]

    def left(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Return the epoch that a step begins in, and how often each picture is still seen in it, as in `Start`."""
        epoch, position = self._place(step, 0)
        left = [min(0, times) if epoch == self._start.epoch else 0 for times in self._start.left]
        for numbers in self.epoch(epoch)[position:]:
            for number in numbers:
                left[number] += 1
        return epoch, tuple(left)

    def _place(self, step: int, index: int) -> tuple[int, int]:
        """Return the epoch of micro-batch `index` of a step, and its position there."""
        if step < self._start.step:
            raise ValueError(f"step {step} is before the first one of this order, {self._start.step}")
        place = (step - self._start.step) * self._accumulation + index
        if place < self._in_first_epoch:
            return self._start.epoch, place
        place -= self._in_first_epoch
        if not self._counts.are_drawn:
            epochs, position = divmod(place, self._num_batches_of(0))
            return self._start.epoch + 1 + epochs, position
        while not self._ends or self._ends[-1] <= place:
            length = self._num_batches_of(self._start.epoch + 1 + len(self._ends))  # it may be 0
            self._ends.append((self._ends[-1] if self._ends else 0) + length)
        epochs = bisect_right(self._ends, place)
        return self._start.epoch + 1 + epochs, place - (self._ends[epochs - 1] if epochs else 0)

    def _in_buckets(self, counts: Sequence[int]) -> list[list[int]]:
        """Return the numbers of the pictures of each bucket, each as often as it counts."""
        by_bucket: dict[tuple[int, int], list[int]] = {bucket: [] for bucket in sorted(set(self.buckets))}
        for number, (bucket, times) in enumerate(zip(self.buckets, counts, strict=True)):
            by_bucket[bucket] += [number] * times
        return list(by_bucket.values())

    def _num_batches_of(self, epoch: int) -> int:
        """The number of micro-batches of a whole epoch."""
        sizes = self._whole
        if self._counts.are_drawn:
            sizes = sizes + Counter(self.buckets[number] for number in self._counts.drawn(epoch))
        return sum(-(-size // self.batch_size) for size in sizes.values())

    def _num_batches(self, counts: Sequence[int]) -> int:
        return sum(-(-len(numbers) // self.batch_size) for numbers in self._in_buckets(counts))

    def _draw(self, random: Random, counts: Sequence[int]) -> list[tuple[int, ...]]:
        batches: list[tuple[int, ...]] = []
        for numbers in self._in_buckets(counts):
            random.shuffle(numbers)
            batches += [tuple(chunk) for chunk in _chunks(numbers, self.batch_size)]
        random.shuffle(batches)
        return batches


def split(
    sizes: Sequence[int], buckets: Sequence[tuple[int, int]], planned: int, batch_size: int
) -> list[tuple[Piece, ...]]:
    """Return the micro-batches that are computed at once, each as pieces of the planned ones of a step.

    sizes and buckets: those of the planned micro-batches, which hold at most `planned` pictures. batch_size: the most
    pictures that are computed at once; below `planned` the planned ones are cut, above it those of a bucket are joined.
    """
    pieces = [
        Piece(index, start, min(start + batch_size, total), total)
        for index, total in enumerate(sizes)
        for start in range(0, total, batch_size)
    ]
    if batch_size <= planned:
        return [(piece,) for piece in pieces]
    joined: list[tuple[Piece, ...]] = []
    open_at: dict[tuple[int, int], int] = {}  # bucket -> the micro-batch of it that was begun last
    for piece in pieces:
        at = open_at.get(buckets[piece.index])
        if at is not None and sum(other.total for other in joined[at]) + piece.total <= batch_size:
            joined[at] += (piece,)
        else:
            open_at[buckets[piece.index]] = len(joined)
            joined.append((piece,))
    return joined


def deal(costs: Sequence[int], hands: int) -> list[list[int]]:
    """Return which micro-batches each of `hands` processes computes, so that none has much more to do than another.

    costs: what each micro-batch takes, in any unit. The dearest goes first, to who has least to do by then; each hand
    keeps the order of the step.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    load = [0] * hands
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        hand = load.index(min(load))
        dealt[hand].append(index)
        load[hand] += costs[index]
    return [sorted(hand) for hand in dealt]


def dropped(seed: int, step: int, index: int, num: int, share: float) -> list[bool]:
    """Return for each of the `num` captions of planned micro-batch `index` of a step whether it is left empty."""
    random = stream(seed, "dropout", step, index)
    return [random.random() < share for _ in range(num)]


def _chunks(numbers: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
