"""Where every thread stands: on SIGUSR1, and by itself when no step has come for long."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

HANGS_AFTER = 600.0  # seconds without a step


class Watchdog:
    """Prints the stacks of all threads to standard error when a run seems to hang."""

    def __init__(self, seconds: float = HANGS_AFTER) -> None:
        """Takes after how many seconds without a sign of life it prints."""
        self._seconds = seconds
        self._file: TextIO | None = None  # while it watches

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Listens for SIGUSR1 while inside; the stacks go to standard error, the run goes on."""
        if sys.__stderr__ is None:  # a program without a console
            yield self
            return
        self._file = sys.__stderr__
        faulthandler.register(signal.SIGUSR1, file=self._file, all_threads=True)
        try:
            yield self
        finally:
            self._file = None
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGUSR1)

    def alive(self) -> None:
        """A step is done: the time begins anew."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def rest(self) -> None:
        """What comes now may take long, such as an evaluation: not watched until `alive`."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
