"""Measures how fast a run trains."""

from __future__ import annotations

import time

MEMORY = 0.9
"""How much less a step counts in the running mean than the one after it."""


class Pace:
    """The running mean of images per second, over the work of steps alone.

    The first step, which is the slowest by far, counts no more than its share: means are divided by the sum of their
    weights, as those of Adam are (arXiv 1412.6980, section 3).
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds_per_image, self._weight = 0.0, 0.0

    def begin_step(self) -> None:
        """Start the clock before a step's work, so that previews and saves between steps do not count as training."""
        self._began = time.monotonic()

    def end_step(self, num_images: int) -> float:
        """Stop the clock after a step's work over `num_images` images; return the running mean of images per second."""
        seconds = max(1e-9, time.monotonic() - self._began) / max(1, num_images)
        self._seconds_per_image = MEMORY * self._seconds_per_image + seconds
        self._weight = MEMORY * self._weight + 1
        return self._weight / self._seconds_per_image
