"""How a run ends early: on SIGTERM, as schedulers send it, or on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from mlip_jax.core.errors import STOPPED
from mlip_jax.devices import processes

_WORD = "stop"
_NO_SIGNAL = 0


class Stopped(BaseException):
    """A signal asked for an end in the middle of what can be done again."""


class Stop:
    """Set by SIGTERM or the first Ctrl-C; the second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = False
        self._leaves = False

    def ask(self) -> None:
        """Asks the run to save and stop, as a signal would, from within."""
        self.asked = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Listens while inside; what one process of several hears, all do."""
        former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number: int, _: Any) -> None:
            if self._leaves:
                return
            signal.signal(signal.SIGINT, former[signal.SIGINT])
            if not self.asked and not jax.process_index():
                # Not by print: the signal may have come in the middle of one.
                with contextlib.suppress(OSError):
                    name = signal.Signals(number).name
                    os.write(2, f"\n{name}: saving, then stopping\n".encode())
            self.asked = True
            processes.announce(_WORD)
            if self._interrupts:
                self._interrupts = False
                raise Stopped

        for number in former:
            signal.signal(number, ask)
        try:
            with processes.hearing(_WORD, self._hear):
                yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _hear(self, _: str) -> None:
        if not self.asked:
            os.kill(os.getpid(), signal.SIGTERM)  # to the main thread, wherever it is

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Where there is nothing to save yet: inside, a signal ends this process at once, with 75.

        Python's handlers wait for the main thread, which may be in the compiler for minutes. So a
        thread hears of the signal here.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def leave() -> None:
            number = os.read(reader, 1)[0]
            if number == _NO_SIGNAL:
                return
            if not jax.process_index():
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping; no step was done since the start\n".encode())
            processes.announce(_WORD)
            processes.leave(STOPPED)

        thread = threading.Thread(target=leave, daemon=True)
        former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._leaves = True
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(former)
            self._leaves = False
            os.write(writer, bytes([_NO_SIGNAL]))
            thread.join()
            os.close(reader)
            os.close(writer)

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
