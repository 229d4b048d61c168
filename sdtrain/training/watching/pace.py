"""Measures how fast a run trains."""

from __future__ import annotations

import time

MEMORY = 0.9
"""The share of the running mean that stays at each step."""


class Pace:
    """The running mean of images per second, over the work of steps alone."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds_per_image = 0.0

    def begin_step(self) -> None:
        """Start the clock before a step's work, so that previews and saves between steps do not count as training."""
        self._began = time.monotonic()

    def end_step(self, num_images: int) -> float:
        """Stop the clock after a step's work over `num_images` images; return the running mean of images per second."""
        seconds = max(1e-9, time.monotonic() - self._began) / max(1, num_images)
        before = self._seconds_per_image or seconds
        self._seconds_per_image = MEMORY * before + (1 - MEMORY) * seconds
        return 1 / self._seconds_per_image
