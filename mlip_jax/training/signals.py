"""How a run ends early: on SIGTERM, as schedulers send it, or on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import jax

from mlip_jax.core import stopping
from mlip_jax.core.stopping import STOPPED
from mlip_jax.devices import processes

_T = TypeVar("_T")
_WORD = "stop"
_INTERRUPTED = 130  # the exit code
_GRACE = 4.0  # seconds that the main thread has to hear of a signal


class Stopped(BaseException):
    """A signal asked for an end in the middle of what can be done again."""


class Stop:
    """Set by SIGTERM or the first Ctrl-C; the second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = False
        self._leaves = False
        self._heard = 0  # the signal that came where there was nothing to save
        self._count = 0
        self._saved = False
        self._left = threading.Event()

    def ask(self) -> None:
        """Asks the run to save and stop, as a signal would, from within."""
        self.asked = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Listens while inside; what one process of several hears, all do."""
        former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number: int, _: Any) -> None:
            if self._leaves:
                self._heard = number
                return
            if not stopping.owns_process():
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
        listener = stopping.Listener(self._hear_signal)
        stopping.hand_over(listener)
        try:
            with processes.hearing(_WORD, self._hear):
                yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            listener.close()

    def _hear(self, _: str) -> None:
        if not self.asked:
            os.kill(os.getpid(), signal.SIGTERM)  # to the main thread, wherever it is

    def _hear_signal(self, number: int) -> None:
        """In a thread, so that it does not wait for the main one."""
        self._count += 1
        if self._leaves:
            _leave(number)
        elif number == signal.SIGINT and self._count > 1 and stopping.owns_process():
            # An exception would be lost where a library calls us back, or catches them all.
            os.write(2, b"\nerror: interrupted\n")
            processes.leave(_INTERRUPTED)
        elif self._saved and stopping.owns_process() and jax.process_count() == 1:
            # The main thread may be in a compiler, or wait for a disk.
            if not self._left.wait(_GRACE):
                os.write(2, b"stopped by a signal; everything is saved\n")
                processes.leave(STOPPED)

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Where there is nothing to save yet: inside, a signal ends this process at once, with 75.

        An exception after it is what came of it.
        """
        self._leaves = True
        try:
            yield
        finally:
            self._leaves = False
            if self._heard:
                _leave(self._heard)

    @contextlib.contextmanager
    def interrupting(self, saved: bool = False) -> Iterator[None]:
        """Where a signal need not wait for the end: inside, it raises Stopped.

        Args:
          saved: whether nothing is lost where the program ends without another word.

        Raises:
          Stopped: at once, when a signal has come already; and for any error after one, which is
            what a library made of it.
        """
        self._interrupts = True
        self._left.clear()
        try:
            if self.asked:
                raise Stopped
            self._saved = saved
            yield
        except Exception as error:
            if not self.asked:
                raise
            raise Stopped from error
        finally:
            self._interrupts = self._saved = False
            self._left.set()


def in_thread(function: Callable[[], _T]) -> _T:
    """What a function gives, in a thread of its own: a compiler there keeps no signal waiting.

    Where the wait is interrupted, the thread goes on, and nobody hears of its end.
    """
    answer: Future[_T] = Future()

    def act() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    # A thread of a pool would be waited for at the end of the program.
    threading.Thread(target=act, daemon=True).start()
    return answer.result()


def _leave(number: int) -> None:
    if not jax.process_index():
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping; no step was done since the start\n".encode())
    processes.announce(_WORD)
    processes.leave(STOPPED)
