"""Whether the other processes of a run are still there: each says so every few seconds, whatever else it does.

A process that dies closes its connections, and the others know at once. One whose machine or network is gone says
nothing, and those that wait for it would wait for as long as they let the first one write, which is long. So a thread
of each process counts in the store that the processes met at, and reads what the others count.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

BEAT_S = 5.0
"""How often a process says that it is there."""
LOST_S = 180.0
"""A process that has said nothing for so long is lost, and so is one that does not reach the store for so long."""
LEAVE_S = 600.0
"""So long a process may take to save and to end once another one is lost; a call on a card may never come back."""
STUCK = (
    "this process waits for it in a call that nothing can end, and so is ended: start the run again with --resume, "
    "which goes on from its newest training state"
)
LAST_S = 20.0
"""So long it may take to end once it has nothing left to do."""


class Pulse:
    """One process's view of the others. `lost` is a sentence as soon as one of them is lost, and empty until then."""

    def __init__(self, store: Any, rank: int, size: int, release: Callable[[], None] = lambda: None) -> None:
        """store: of torch.distributed, one that no other thread uses. release: ends what a card waits for."""
        self._store, self._rank, self._release = store, rank, release
        now = time.monotonic()
        self._heard = {other: now for other in range(size) if other != rank}
        self._reached, self._ends_at = now, now + LEAVE_S
        self._stopped = threading.Event()
        self.lost, self._is_over = "", False
        for name, what in (("pulse", self._beat), ("pulse of the others", self._watch)):
            threading.Thread(target=what, name=name, daemon=True).start()

    def stop(self) -> None:
        """End: the run has ended on all ranks, or this one does; where one is lost it ends within `LAST_S`."""
        if self.lost:
            self._is_over, self._ends_at = True, time.monotonic() + LAST_S
        else:
            self._stopped.set()

    def _beat(self) -> None:
        """Count, and read what the others count. A store that is out of reach may keep this thread for good."""
        told, count = dict.fromkeys(self._heard, b""), 0
        self._store.set_timeout(timedelta(seconds=BEAT_S))
        while not self._stopped.wait(BEAT_S):
            count += 1
            try:
                self._store.set(_key(self._rank), str(count))
                found = {rank: self._store.get(_key(rank)) for rank in told if self._store.check([_key(rank)])}
            except RuntimeError:  # of torch.distributed: nobody answers, or not in time
                continue
            self._reached = time.monotonic()
            self._heard |= {rank: self._reached for rank, beat in found.items() if beat != told[rank]}
            told |= found

    def _watch(self) -> None:
        """Look how long nothing was heard, and see to it that the process ends then."""
        while not self._stopped.wait(min(1.0, BEAT_S)):
            now = time.monotonic()
            silent = [rank for rank, last in self._heard.items() if now - last > LOST_S]
            if now - self._reached > LOST_S:
                self.lost = f"rank 0 and the others cannot be reached any more, for {LOST_S:.0f} s"
            elif silent:
                what = f"rank {silent[0]} has not been heard of for {LOST_S:.0f} s"
                self.lost = f"{what}: its machine or the network to it is gone"
            if self.lost:
                self._see_it_end()

    def _see_it_end(self) -> None:
        """End the process where it does not end itself, which a card or a library may keep it from."""
        self._ends_at = time.monotonic() + LEAVE_S
        self._release()
        while time.monotonic() < self._ends_at:
            time.sleep(min(0.1, BEAT_S))
        if not self._is_over:
            sys.stderr.write(f"\n{self.lost}; {STUCK}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _key(rank: int) -> str:
    return f"alive/{rank}"
