"""Reading a little ahead of the training, in a thread, so that a step does not wait for the disk."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

DEPTH = 4
"""How many things are read ahead; memory holds no more than these."""


class ReadAhead(Generic[K, V]):
    """Values by key: those that are expected next are read while others are in use.

    A value is a function of its key alone, so what is expected and what is asked for may differ: only time is lost.
    The thread begins with the first value and ends with `close`; it never waits for anybody.
    """

    def __init__(self, read: Callable[[K], V], depth: int = DEPTH) -> None:
        """read: is called with a key, in the thread. What it raises is raised where its value is asked for."""
        self._read, self._depth = read, depth
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: dict[K, Future[V]] = {}

    def get(self, key: K, following: Iterable[K]) -> V:
        """Return the value of a key; meanwhile as many of the following ones are read as the depth allows."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        now = self._waiting.pop(key, None) or self._thread.submit(self._read, key)
        expected = list(dict.fromkeys(islice(following, self._depth)))
        for other in [other for other in self._waiting if other not in expected]:
            self._waiting.pop(other).cancel()
        for other in expected:
            if other not in self._waiting:
                self._waiting[other] = self._thread.submit(self._read, other)
        return now.result()

    def close(self) -> None:
        """End the thread and forget what was read ahead; a later `get` begins anew."""
        self._waiting.clear()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
