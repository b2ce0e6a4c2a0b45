"""The order of a dataset in shards that is mixed a window of shards at a time.

The rows of the global batch are divided into lanes, one a shard of the window. In each epoch the
shards, in a random order, are laid end to end and cut into one stretch a lane, as long as the
lane's rows are many in that epoch. A lane goes through its stretch shard by shard, the records of
each shuffled. So the order depends on no host, and a host that feeds the rows of whole lanes reads
no record that another host reads: of a shard that is cut, each reads its own part.
"""

from __future__ import annotations

import itertools
import math
import sys
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from mlip_jax.data.sets.mixtures import Mixture

_SHARDS, _RECORDS = 0, 1  # what is shuffled


class _Turns:
    """Which positions of the stream are a dataset's: all, or its turns in a mixture."""

    def __init__(self, mixture: Mixture | None = None, number: int = 0) -> None:
        drawn = np.arange(2) if mixture is None else mixture.drawn(number)
        self.period = len(drawn) - 1
        self._drawn: list[int] = drawn.tolist()

    def count(self, position: int) -> int:
        """How many of its samples stand before a position."""
        periods, turn = divmod(position, self.period)
        return periods * self._drawn[-1] + self._drawn[turn]

    def position(self, count: int) -> int:
        """The first position before which so many of its samples stand."""
        periods, rest = divmod(count, self._drawn[-1])
        return periods * self.period + bisect_left(self._drawn, rest)


class _Epoch(NamedTuple):
    """How the shards lie in an epoch."""

    before: list[int]  # samples of each lane before the epoch
    starts: list[int]  # where each lane's stretch begins, and at the end their sum
    shards: list[int]  # in their order
    ends: list[int]  # of these, laid end to end


class _Piece(NamedTuple):
    """Records of a stretch that are shuffled together."""

    start: int
    end: int
    first: int  # the places of its shards in the epoch's order, from ... to
    last: int


class WindowedOrder:
    """The index at each position of the stream: a function of seed and position alone."""

    def __init__(
        self,
        ends: Int64[np.ndarray, " shards"],
        seed: int,
        batch_size: int,
        window: int,
        mixture: Mixture | None = None,
        number: int = 0,
    ) -> None:
        """Orders a dataset.

        Args:
          ends: where each shard's records end.
          seed: of this dataset.
          batch_size: rows of the global batch.
          window: shards whose records are mixed, at least 1.
          mixture: of which this is the dataset `number`; None: it is alone.
        """
        # Lists: a single number is taken from them, and looked for, in a tenth of the time.
        self._ends: list[int] = np.asarray(ends).tolist()
        self._sizes = np.diff(ends, prepend=0)
        self._total = self._ends[-1]
        self._seed = seed
        self._batch_size = batch_size
        self._turns = _Turns(mixture, number)
        self.lanes = max(1, min(window, batch_size, int(np.count_nonzero(self._sizes))))
        self._together = max(1, min(window, len(self._ends)) // self.lanes)  # shards of a piece
        self._bounds = [lane * batch_size // self.lanes for lane in range(self.lanes + 1)]
        rows = np.arange(batch_size)
        self._lane_of_row = (np.searchsorted(self._bounds, rows, "right") - 1).tolist()
        # How many of a lane's rows are this dataset's repeats after so many steps.
        steps = self._turns.period // math.gcd(self._turns.period, batch_size)
        starts = range(0, steps * batch_size, batch_size)
        marks = [[self._turns.count(start + bound) for bound in self._bounds] for start in starts]
        counts = np.zeros((self.lanes, steps + 1), np.int64)
        np.cumsum(np.diff(marks, axis=1).T, axis=1, out=counts[:, 1:])
        self._rows: list[list[int]] = counts.tolist()
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._permutations: OrderedDict[tuple[int, int], Int[np.ndarray, " records"]] = (
            OrderedDict()
        )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> int:
        epoch, place, piece = self._find(position)
        permutation = self._permutation(epoch, piece)
        place = piece.start + int(permutation[place - piece.start])
        shards = self._epoch(epoch)
        at = bisect_right(shards.ends, place)
        return self._ends[shards.shards[at]] - shards.ends[at] + place

    def shards_for(
        self, step: int, rows: Sequence[int], steps: int = 1
    ) -> tuple[list[int], list[int]]:
        """The shards that some rows of the global batch read, and those that they read next.

        Args:
          step: of the first batch.
          rows: of the global batch.
          steps: how many batches.

        Returns:
          Both in the order in which they are needed, none twice.
        """
        lanes = sorted({self._lane_of_row[row] for row in rows})
        ways = [self._way(lane, step, steps) for lane in lanes]
        turns = itertools.zip_longest(*(way[:-1] for way in ways), fillvalue=list[int]())
        now = dict.fromkeys(shard for turn in turns for piece in turn for shard in piece)
        later = dict.fromkeys(shard for way in ways for shard in way[-1])
        return list(now), [shard for shard in later if shard not in now]

    def _way(self, lane: int, step: int, steps: int) -> list[list[int]]:
        """The shards of the pieces that a lane goes through in some steps, and of the next one."""
        first = step * self._batch_size + self._bounds[lane]
        last = (step + steps - 1) * self._batch_size + self._bounds[lane + 1] - 1
        epoch, _, piece = self._find(first)
        until, place, _ = self._find(last)
        ways = []
        while True:
            shards = self._epoch(epoch)
            ways.append(shards.shards[piece.first : piece.last])
            if (epoch, piece.start) > (until, place):
                return ways
            start = piece.end
            if start >= shards.starts[lane + 1]:
                epoch += 1
                shards = self._epoch(epoch)
                start = shards.starts[lane]
            piece = self._piece(shards, lane, start)

    def _find(self, position: int) -> tuple[int, int, _Piece]:
        """The epoch of the sample at a position, its place there, and the piece around it."""
        position = int(position)
        number = self._turns.count(position) // self._total
        lane = self._lane_of_row[position % self._batch_size]
        epoch = self._epoch(number)
        place = epoch.starts[lane] + self._count(lane, position) - epoch.before[lane]
        # Of a dataset whose turn it is not there may be no more in this epoch.
        place = min(place, max(epoch.starts[lane + 1] - 1, epoch.starts[lane]), self._total - 1)
        return number, place, self._piece(epoch, lane, place)

    def _count(self, lane: int, position: int) -> int:
        """How many samples of a lane stand before a position."""
        step, row = divmod(position, self._batch_size)
        rows = self._rows[lane]
        periods, rest = divmod(step, len(rows) - 1)
        begun = self._turns.count(step * self._batch_size + self._bounds[lane])
        row = min(max(row, self._bounds[lane]), self._bounds[lane + 1])
        within = self._turns.count(step * self._batch_size + row) - begun
        return periods * rows[-1] + rows[rest] + within

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            marks = [self._turns.position(each * self._total) for each in (number, number + 1)]
            before, after = (
                [self._count(lane, mark) for lane in range(self.lanes)] for mark in marks
            )
            starts = np.cumsum([0, *np.subtract(after, before)]).tolist()
            shards = self._shuffled(len(self._ends), number, _SHARDS)
            ends = np.cumsum(self._sizes[shards]).tolist()
            self._epochs[number] = _Epoch(before, starts, shards.tolist(), ends)
            if len(self._epochs) > 3:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _piece(self, epoch: _Epoch, lane: int, place: int) -> _Piece:
        """The piece of a lane's stretch that holds a place."""
        start, end = epoch.starts[lane], epoch.starts[lane + 1]
        at = bisect_right(epoch.ends, place)
        first = bisect_right(epoch.ends, start)
        first += (at - first) // self._together * self._together
        last = min(first + self._together, len(epoch.ends))
        begin = epoch.ends[first - 1] if first else 0
        return _Piece(max(start, begin), min(end, epoch.ends[last - 1]), first, last)

    def _permutation(self, epoch: int, piece: _Piece) -> Int[np.ndarray, " records"]:
        key = epoch, piece.start
        if key not in self._permutations:
            self._permutations[key] = self._shuffled(piece.end - piece.start, *key, _RECORDS)
            if len(self._permutations) > 2 * self.lanes:
                self._permutations.popitem(last=False)
        self._permutations.move_to_end(key)
        return self._permutations[key]

    def _shuffled(self, number: int, *key: int) -> Int[np.ndarray, " number"]:
        """A permutation by the seed and a key; the same in every version of NumPy."""
        draws = np.random.Philox(np.random.SeedSequence([self._seed, *key])).random_raw(number)
        return np.argsort(draws, kind="stable").astype(np.int32)
