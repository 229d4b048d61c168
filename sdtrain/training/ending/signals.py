"""Requests to end a run: Ctrl-C, and what schedulers of jobs and closing terminals send. No torch.

A signal is answered at once by a thread of its own, for the main thread may be inside one long operation; the main
thread acts on it between two steps.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from sdtrain.errors import Interrupted
from sdtrain.training.watching.text import say

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOPPING = tuple(signal.Signals[name] for name in NAMES if name in signal.Signals.__members__)
"""The signals that end a run between two steps; not every system has all of them."""
SAME_PRESS_S = 0.3
"""A second Ctrl-C within this time is the first one, passed on by a program around this one as well."""
SHOW_CURSOR = "\x1b[?25h"


class GivenUpError(Exception):
    """Pictures were given up, because the run was asked to end."""


class StopRequests:
    """Whether a run was asked to end, and by which signal.

    Before `finish_first` a signal raises `Interrupted` at once; after it the run goes on until it looks. Only a second
    Ctrl-C hurries: other signals are sent by machines, which repeat themselves, and end by SIGKILL those who dawdle.
    """

    def __init__(self, say: Callable[[str], None], *, leave: bool) -> None:
        """say: tells the person something. leave: whether a second Ctrl-C ends the process, or raises."""
        self._say, self._leave = say, leave
        self._number, self._since, self._answered_at = 0, 0.0, 0.0
        self._finishing: Callable[[], str] | None = None
        self._kept: Callable[[], str] = str
        self._finished_first = ""  # what was still done when the first signal came
        self.doing = "starting"
        """What is done before the first step, for the person who stops it there."""

    @property
    def asked(self) -> bool:
        """Whether the run was asked to end."""
        return self._number != 0

    @property
    def number(self) -> int:
        """The number of the first signal; 0 without one."""
        return self._number

    @property
    def name(self) -> str:
        """What a person calls the first signal."""
        return _name_of(self._number)

    def give_up(self) -> None:
        """Raise GivenUpError if the run was asked to end; for what is worth less than a quick end."""
        if self.asked:
            raise GivenUpError

    def ask(self, number: int = signal.SIGINT) -> None:
        """Ask the run to end, as a signal of this number does."""
        self._number, self._since = self._number or number, self._since or time.monotonic()

    def leave_if_asked(self) -> None:
        """Raise Interrupted if a signal came; for the places between two long operations before the first step."""
        if self._number:
            raise Interrupted(self._number)

    def finish_first(self, what: Callable[[], str], kept: Callable[[], str]) -> None:
        """From here on a signal only asks: the run looks at `asked` and ends by itself.

        what: says what is still done then. kept: says what is there for those who leave at once.
        """
        self.leave_if_asked()
        self._finishing, self._kept = what, kept

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Act in the main thread."""
        if self._finishing is not None and not self._finished_first:
            self._finished_first = self._finishing()  # the answer may come when something else is done already
        is_second = self.asked and time.monotonic() - self._since > SAME_PRESS_S
        self.ask(number)
        if self._finishing is None:
            raise Interrupted(self._number)
        if is_second and number == signal.SIGINT and not self._leave:
            raise KeyboardInterrupt

    def _answer(self, number: int) -> None:
        """Answer in a thread, whatever the main thread is doing."""
        now = time.monotonic()
        if not self._answered_at:
            self._answered_at = now
            self._say(self._first_answer(number))
        elif number == signal.SIGINT and now - self._answered_at > SAME_PRESS_S:
            kept = f"; {text}" if (text := self._kept()) else ""
            if self._leave:
                _write_and_exit(f"left at once{kept}\n", 128 + (self._number or number))
            self._say(f"leaving at once{kept}")

    def _first_answer(self, number: int) -> str:
        name = _name_of(number)
        if self._finishing is None:
            return f"{name}: stopped while {self.doing}; nothing was trained yet, so there is nothing to save"
        more = "; once more leaves now" if number == signal.SIGINT else ""
        return f"{name}: {self._finished_first or self._finishing()}{more}"


def _name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _write_and_exit(text: str, code: int) -> None:
    """End the process, past everything that could wait for the main thread; what is on the disk is whole."""
    cursor = SHOW_CURSOR if sys.stdout.isatty() else ""
    try:
        os.write(2, f"\n{cursor}{text}".encode())
    finally:
        os._exit(code)


def speaker(console: Console) -> Callable[[str], None]:
    """Return a function that shows a line to the person: on the console, or on stderr where stdout is led elsewhere."""
    if not console.is_terminal and not console.quiet and console.file is sys.stdout:
        console = Console(stderr=True)
    return lambda text: say(console, text)


@contextmanager
def stop_requests(say: Callable[[str], None], *, leave: bool = False) -> Iterator[StopRequests]:
    """Give what the signals ask for; afterwards they do what they did before.

    A hang-up that is ignored stays so, as `nohup` asks for. say, leave: see `StopRequests`.
    """
    stop = StopRequests(say, leave=leave)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread; elsewhere nobody sends any
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = {number: signal.getsignal(number) for number in STOPPING}
    heard = [number for number, handler in before.items() if not _is_left_alone(number, handler)]
    woken = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(ours, stop._answer), daemon=True)
    listener.start()
    for number in heard:
        signal.signal(number, stop._handle)
    try:
        yield stop
    finally:
        for number in heard:
            signal.signal(number, before[number])
        signal.set_wakeup_fd(woken)
        theirs.setblocking(True)
        theirs.sendall(b"\0")
        listener.join(timeout=5)
        ours.close()
        theirs.close()


def _is_left_alone(number: signal.Signals, handler: object) -> bool:
    """Return whether a signal is not ours: `nohup` ignores the hang-up, and None is a handler that is not Python's.

    An ignored Ctrl-C is ours all the same: a shell ignores it for what a script starts with `&`, where it saves too.
    """
    return handler is None or (handler == signal.SIG_IGN and number.name == "SIGHUP")


def _listen(pipe: socket.socket, answer: Callable[[int], None]) -> None:
    while (received := pipe.recv(1)) not in (b"", b"\0"):
        if received[0] in STOPPING:
            answer(received[0])
