"""How often each picture is seen in an epoch: whole repeats, and parts of one that are drawn by (seed, epoch)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from random import Random


def stream(*names: int | str) -> Random:
    """Return a generator that depends on these names only.

    A seed that is text is hashed with SHA-512, which gives the same numbers on every machine.
    """
    return Random("/".join(str(name) for name in names))


class Counts:
    """How often each picture is seen in an epoch: floor(repeats) times, and once more with the rest as probability.

    Of n pictures with the same rest p, floor(n p) or one more are drawn, so that an epoch has nearly the same number of
    them every time, and each picture is there with the probability p.
    """

    def __init__(self, repeats: Sequence[float], seed: int) -> None:
        self.whole = tuple(math.floor(times) for times in repeats)
        self._seed = seed
        self._alike: dict[float, list[int]] = defaultdict(list)
        for number, (times, floor) in enumerate(zip(repeats, self.whole, strict=True)):
            if times > floor:
                self._alike[times - floor].append(number)

    @property
    def are_drawn(self) -> bool:
        """Whether epochs differ in the pictures that they have."""
        return bool(self._alike)

    def drawn(self, epoch: int) -> list[int]:
        """Return the numbers of the pictures that are seen once more in an epoch than their whole repeats."""
        random = stream(self._seed, "repeats", epoch)
        found: list[int] = []
        for rest, numbers in sorted(self._alike.items()):
            found += random.sample(numbers, math.floor(len(numbers) * rest + random.random()))
        return found

    def at(self, epoch: int) -> tuple[int, ...]:
        """Return how often each picture is seen in an epoch."""
        if not self.are_drawn:
            return self.whole
        times = list(self.whole)
        for number in self.drawn(epoch):
            times[number] += 1
        return tuple(times)
