"""Which record stands at each position of the training stream."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import grain
import numpy as np

from mlip_jax.data.batches.windows import WindowedOrder
from mlip_jax.data.sets.mixtures import Mixture
from mlip_jax.data.sets.records import InShards, Source


def order(source: Source, seed: int, batch_size: int = 1) -> grain.MapDataset:
    """The index at each position, without end: a function of seed and position alone.

    A source is shuffled anew in each of its epochs, and so is each dataset of a mixture, whose
    datasets take turns by their weights. One in shards is mixed a window of them at a time, if it
    has a window; then `batch_size` matters, too: see `windows`.
    """
    if not isinstance(source, Mixture):
        for _, alone in windowed_orders(source, seed, batch_size):
            return grain.MapDataset.source(alone).seed(seed)
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    windowed = dict(windowed_orders(source, seed, batch_size))
    indices = [
        _Windowed(windowed[number], span.start)
        if number in windowed
        else _Shuffled(span, _own_seed(seed, number))
        for number, span in enumerate(source.sets())
    ]
    return grain.MapDataset.source(_Turns(source, indices)).seed(seed)


def windowed_orders(source: Source, seed: int, batch_size: int) -> list[tuple[int, WindowedOrder]]:
    """The orders of the datasets of a source that are mixed by windows, by their numbers."""
    if not isinstance(source, Mixture):
        if not isinstance(source, InShards) or not source.window:
            return []
        return [(0, WindowedOrder(source.shard_ends(), seed, batch_size, source.window))]
    return [
        (
            number,
            WindowedOrder(
                part.shard_ends(),
                _own_seed(seed, number),
                batch_size,
                part.window,
                source,
                number,
            ),
        )
        for number, part in enumerate(source.sources)
        if isinstance(part, InShards) and part.window
    ]


class _Shuffled:
    """All of a dataset at random."""

    def __init__(self, span: range, seed: int) -> None:
        self._order = grain.MapDataset.range(span.start, span.stop).seed(seed).shuffle().repeat()

    def __call__(self, position: int, before: int) -> int:
        del position
        return int(self._order[before])


class _Windowed:
    """A dataset that is mixed by windows."""

    def __init__(self, order: WindowedOrder, start: int) -> None:
        self._order, self._start = order, start

    def __call__(self, position: int, before: int) -> int:
        del before
        return self._start + self._order[position]


def _own_seed(seed: int, number: int) -> int:
    """Another for each dataset, so that datasets of one size are not shuffled alike."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class _Turns:
    """The next index of the dataset whose turn it is."""

    def __init__(self, mixture: Mixture, indices: Sequence[_Shuffled | _Windowed]) -> None:
        self._mixture = mixture
        self._indices = indices

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> int:
        number, before = self._mixture.turn(int(position))
        return self._indices[number](int(position), before)
