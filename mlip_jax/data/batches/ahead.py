"""Brings the shards of datasets in buckets before the training batches need them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence

from mlip_jax.data.batches.windows import WindowedOrder
from mlip_jax.data.sets.records import InShards

_AT_ONCE = 4  # shards
_AGAIN = 20.0  # seconds after which a shard is said to be needed again
_RETRY = 0.2  # seconds for which none is asked for when one could not be brought
_PAUSE = 0.1  # seconds between two looks at what is needed

_Key = tuple[int, int]  # number of the dataset, of the shard


class ReadAhead:
    """Brings what a process's rows need now, then what they need next; lets go of the rest.

    It takes the room of nothing that may be needed. What it cannot bring is left to those who read
    it.
    """

    def __init__(
        self,
        parts: Sequence[tuple[InShards, WindowedOrder]],
        rows: Sequence[int],
        start_step: int,
        ahead: int,
    ) -> None:
        """Begins nothing yet.

        Args:
          parts: the datasets whose shards are to be brought, and their orders.
          rows: of the global batch, those of this process.
          start_step: of the first batch.
          ahead: batches that may be in the making beyond the one that is taken next.
        """
        self._parts = list(parts)
        self._rows = rows
        self._step = start_step
        self._ahead = ahead
        self._ended = threading.Event()
        self._waiting = threading.Condition()
        self._wanted: list[_Key] = []  # the most urgent first
        self._now: set[_Key] = set()  # those of them that are read now
        self._coming: set[_Key] = set()
        self._due: dict[_Key, float] = {}  # when to ask again for those that came
        self._idle_until = 0.0

    def start(self) -> None:
        """Begins with the shards of the first batch."""
        if self._parts:
            targets = [self._look, *[self._bring] * _AT_ONCE]
            for target in targets:  # daemons: a server that stays away holds up no end
                threading.Thread(target=target, daemon=True, name="shards ahead").start()

    def end(self) -> None:
        """Has its threads end; waits for none."""
        self._ended.set()
        with self._waiting:
            self._waiting.notify_all()

    def advance(self) -> None:
        """Says that a batch was taken."""
        self._step += 1

    def _look(self) -> None:
        looked = -1
        while not self._ended.is_set():
            if self._step != looked:
                looked = self._step
                self._want(*self._needed(looked))
            with self._waiting:
                self._waiting.notify_all()
            self._ended.wait(_PAUSE)

    def _needed(self, step: int) -> tuple[list[_Key], list[_Key]]:
        """What the batches in the making read, and what follows."""
        now: list[_Key] = []
        later: list[_Key] = []
        for number, (_, order) in enumerate(self._parts):
            read, read_next = order.shards_for(step, self._rows, self._ahead + 1)
            now += [(number, shard) for shard in read]
            later += [(number, shard) for shard in read_next]
        return now, later

    def _want(self, now: list[_Key], later: list[_Key]) -> None:
        with self._waiting:
            for key in set(now) - self._now:
                self._due.pop(key, None)  # it is to be kept from now on
            # Whoever brought them: what is not needed any more is the first to make room.
            done = set(self._wanted).difference(now, later)
            self._wanted, self._now = [*now, *later], set(now)
            for key in done:
                self._due.pop(key, None)
        for number, shard in done:
            self._parts[number][0].release(shard)

    def _next(self) -> _Key | None:
        """The most urgent shard that is not here, or that is kept and was named long ago."""
        now = time.monotonic()
        for key in self._wanted if now >= self._idle_until else ():
            if key not in self._coming and now >= self._due.get(key, now):
                return key
        return None

    def _bring(self) -> None:
        while not self._ended.is_set():
            with self._waiting:
                key = self._next()
                if key is None:
                    self._waiting.wait()
                    continue
                self._coming.add(key)
            number, shard = key
            dataset = self._parts[number][0]
            came = False
            # Whatever it is: at the end of the program even libraries that are closed.
            with contextlib.suppress(Exception):
                dataset.bring(shard, ahead=True)
                came = True
            with self._waiting:
                self._coming.discard(key)
                if not came:
                    self._idle_until = time.monotonic() + _RETRY
                elif key in self._wanted:
                    self._due[key] = time.monotonic() + _AGAIN
                needed = key in self._now
            if not needed:
                dataset.release(shard)  # what is needed now may take its room
