"""Which pictures each step sees: a function of (seed, step) only, so that resuming needs no position in the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random


class Order:
    """The endless row of micro-batches, epoch after epoch; each step takes the next `accumulation` of them.

    Within an epoch every picture is there exactly `repeats` times, no micro-batch mixes buckets, the last one of a
    bucket may be smaller, and those of all buckets are shuffled together. Pictures are numbered as they were handed in.
    The only state is the epoch that was drawn last, which saves drawing it again at every step.
    """

    def __init__(
        self,
        buckets: Sequence[tuple[int, int]],
        repeats: Sequence[int],
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
    ) -> None:
        by_bucket: dict[tuple[int, int], list[int]] = {bucket: [] for bucket in sorted(set(buckets))}
        for number, (bucket, times) in enumerate(zip(buckets, repeats, strict=True)):
            by_bucket[bucket] += [number] * times
        self._buckets = tuple(tuple(numbers) for numbers in by_bucket.values())
        self._batch_size, self._accumulation, self._seed = batch_size, accumulation, seed
        self._last: tuple[int, list[tuple[int, ...]]] | None = None
        self.num_images = sum(len(numbers) for numbers in self._buckets)
        self.batches_per_epoch = sum(-(-len(numbers) // batch_size) for numbers in self._buckets)
        if not self.num_images:
            raise ValueError("no pictures to order")

    @property
    def steps_per_epoch(self) -> float:
        return self.batches_per_epoch / self._accumulation

    def step(self, step: int) -> list[tuple[int, ...]]:
        """Return the micro-batches of a step; a picture is named by its number."""
        first = step * self._accumulation
        positions = (divmod(index, self.batches_per_epoch) for index in range(first, first + self._accumulation))
        return [self.epoch(epoch)[position] for epoch, position in positions]

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """Return all micro-batches of an epoch in the order in which they are seen."""
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._draw(stream(self._seed, "order", epoch)))
        return self._last[1]

    def _draw(self, random: Random) -> list[tuple[int, ...]]:
        batches: list[tuple[int, ...]] = []
        for numbers in self._buckets:
            shuffled = list(numbers)
            random.shuffle(shuffled)
            batches += [tuple(chunk) for chunk in _chunks(shuffled, self._batch_size)]
        random.shuffle(batches)
        return batches


def dropped(seed: int, step: int, index: int, num: int, share: float) -> list[bool]:
    """Return for each caption of micro-batch `index` of a step whether it is left empty."""
    random = stream(seed, "dropout", step, index)
    return [random.random() < share for _ in range(num)]


def stream(*names: int | str) -> Random:
    """Return a generator that depends on these names only.

    A seed that is text is hashed with SHA-512, which gives the same numbers on every machine.
    """
    return Random("/".join(str(name) for name in names))


def _chunks(numbers: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
