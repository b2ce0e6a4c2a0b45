"""Signals while Python's handlers would be late: before there is a run, and in other libraries.

Handlers of Python wait for the main thread, which may be in an import or in a compiler for minutes.
So a thread hears of signals too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

STOPPED = 75  # the exit code that asks a scheduler to start the job again
_NO_SIGNAL = 0


class Listener:
    """A thread that is told of every signal for which Python has a handler."""

    def __init__(self, act: Callable[[int], None]) -> None:
        """Begins to listen; only the main thread may.

        Args:
          act: called in the thread with the number of each signal.
        """
        self._act = act
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._former = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def replace(self, other: Listener) -> None:
        """Closes one that listened before; at the end, who listened before that one does again."""
        self._former = other._former
        other.close()

    def close(self) -> None:
        """Ends the thread, and gives way to who listened before; one who came later goes on."""
        current = signal.set_wakeup_fd(self._former, warn_on_full_buffer=False)
        if current != self._writer:
            signal.set_wakeup_fd(current, warn_on_full_buffer=False)
        os.write(self._writer, bytes([_NO_SIGNAL]))
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _listen(self) -> None:
        while (number := os.read(self._reader, 1)[0]) != _NO_SIGNAL:
            self._act(number)


_early: Listener | None = None
_leaves = False
_owned = False  # whether the process is the command line's, and not a user's own program


def listen_early() -> None:
    """Has SIGTERM end this process with 75, until `hand_over`: for the program's first lines."""
    global _early, _owned
    _owned = True
    signal.signal(signal.SIGTERM, _heard_by_thread)
    _early = Listener(_end)


def let_come() -> None:
    """Lets a SIGTERM come that `held` has kept back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def hand_over(listener: Listener) -> None:
    """Ends `listen_early`: another one listens now."""
    global _early
    if _early is not None:
        listener.replace(_early)
        _early = None


def owns_process() -> bool:
    """Whether the process may be ended without asking whoever imported this package."""
    return _owned


def leave_at_end() -> None:
    """Has the program end without a wait for its threads: one may read from a disk for ever."""
    global _leaves
    _leaves = True


def end(code: int) -> NoReturn:
    """Ends the program."""
    if _leaves:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Keeps SIGTERM back, over a start of the program in the same process too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        let_come()


def _heard_by_thread(number: int, frame: FrameType | None) -> None:
    del number, frame


def _end(number: int) -> None:
    if number == signal.SIGTERM:
        os.write(2, b"\nSIGTERM: stopping; no step was done since the start\n")
        os._exit(STOPPED)
