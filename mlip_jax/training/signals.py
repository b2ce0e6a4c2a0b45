"""How a run ends early: on SIGTERM, as schedulers send it, or on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any


class Stopped(BaseException):
    """A signal asked for an end in the middle of what can be done again."""


class Stop:
    """Set by SIGTERM or the first Ctrl-C; the second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Listens while inside."""
        former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number: int, _: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, former[signal.SIGINT])
            # Not by print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: saving, then stopping\n".encode())
            if self._interrupts:
                self._interrupts = False
                raise Stopped

        for number in former:
            signal.signal(number, ask)
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Where a signal need not wait for the end: inside, it raises Stopped.

        Raises:
          Stopped: at once, when a signal has come already.
        """
        self._interrupts = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._interrupts = False
