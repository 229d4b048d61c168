"""Doing the same with many files, several at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

NUM_THREADS = min(8, os.cpu_count() or 1)


def map_ahead(function: Callable[[T], R], things: Iterable[T]) -> Iterator[R]:
    """Yield a result for each thing, in their order, computed a little ahead of its use.

    Only a little, so that memory holds a few pictures rather than all, and an interrupt does not wait for the rest.
    The first exception is raised where its result would come.
    """
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        waiting: deque[Future[R]] = deque()
        for thing in things:
            waiting.append(threads.submit(function, thing))
            if len(waiting) > 2 * NUM_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
