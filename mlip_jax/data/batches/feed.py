"""Batches as the training loop takes them: waited for with a bound, and in reach of signals."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from mlip_jax.core.errors import RunError, UserError, first_line
from mlip_jax.core.stopping import leave_at_end

Batch = dict[str, np.ndarray]
SECONDS = "MLIP_INPUT_SECONDS"
_SECONDS = 600
_POLL = 0.25  # seconds between two looks at the clock
_FAREWELL = 2.0  # seconds that workers have to end, and once more when they are killed
_WORKERS = "grain"  # what the names of Grain's processes begin with
_WORKER_ENDED = "terminated unexpectedly"  # in Grain's words


class InputLost(RunError):
    """No batch came, or a worker process has ended: the training state is whole."""


def input_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How long a batch may take: MLIP_INPUT_SECONDS, 600 by default.

    Raises:
      UserError: for what is no number of seconds.
    """
    text = environment.get(SECONDS) or str(_SECONDS)
    if not text.isascii() or not text.isdecimal() or int(text[:9]) < 1:
        raise UserError(f"{SECONDS}={text!r}: expected a whole number of seconds, at least 1")
    return int(text[:9])


class Feed:
    """Takes batches in a thread, one when it is asked for, so that nothing can hold up the loop.

    Use it in a `with`: that ends the workers.
    """

    def __init__(self, batches: Generator[Batch], seconds: float, grace: float) -> None:
        """Takes nothing yet.

        Args:
          batches: of `train_batches`; this closes it.
          seconds: how long a batch may take.
          grace: how long once the run is asked to stop.
        """
        self._grace = grace
        self._batches = batches
        self._seconds = seconds
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # No SimpleQueue: a signal that comes as its time runs out makes that one wait for ever.
        self._come: queue.Queue[Any] = queue.Queue()
        self._waits = False
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wanted.put(False)
        if not self._waits:
            self._thread.join(_FAREWELL)
        if self._thread.is_alive():  # it waits for a worker that may never answer
            for worker in multiprocessing.active_children():
                if worker.name.startswith(_WORKERS):
                    worker.kill()
            self._thread.join(_FAREWELL)
        if self._thread.is_alive():
            leave_at_end()

    def next(self, asked: Callable[[], bool]) -> Batch:
        """The next batch.

        Args:
          asked: whether the run is asked to stop: it does not wait for a late batch then.

        Raises:
          InputLost: when none comes in time, or a worker has ended.
          Exception: what reading the batch has raised.
        """
        self._waits = True
        self._wanted.put(True)
        start = time.monotonic()
        asked_since = None
        while True:
            try:
                batch, error = self._come.get(timeout=_POLL)
                break
            except queue.Empty:
                now = time.monotonic()
            if asked():
                asked_since = asked_since or now
                if now - asked_since > self._grace:
                    raise InputLost("the next batch did not come before the end")
            if now - start > self._seconds:
                raise InputLost(
                    f"no batch came within {self._seconds:g} s ({SECONDS}): a disk or a worker "
                    "process that reads the data does not answer"
                )
        self._waits = False
        if error is None:
            return batch
        if isinstance(error, RuntimeError) and _WORKER_ENDED in str(error):
            raise InputLost(
                f"a worker process that reads the data has ended ({first_line(error)}); where "
                "memory is short, lower config.data.workers"
            ) from error
        raise error

    def _take(self) -> None:
        try:
            while self._wanted.get():
                try:
                    self._come.put((next(self._batches), None))
                except BaseException as error:
                    self._come.put((None, error))
        finally:
            self._batches.close()
