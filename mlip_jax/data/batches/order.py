"""Which record stands at each position of the training stream."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import grain
import numpy as np

from mlip_jax.data.sets.mixtures import Mixture
from mlip_jax.data.sets.records import Source


def order(source: Source, seed: int) -> grain.MapDataset:
    """The index at each position, without end: a function of seed and position alone.

    A source is shuffled anew in each of its epochs, and so is each dataset of a mixture, whose
    datasets take turns by their weights.
    """
    if not isinstance(source, Mixture):
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    shuffled = [
        grain.MapDataset.range(span.start, span.stop)
        .seed(_own_seed(seed, number))
        .shuffle()
        .repeat()
        for number, span in enumerate(source.sets())
    ]
    return grain.MapDataset.source(_Turns(source, shuffled)).seed(seed)


def _own_seed(seed: int, number: int) -> int:
    """Another for each dataset, so that datasets of one size are not shuffled alike."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class _Turns:
    """The next index of the dataset whose turn it is."""

    def __init__(self, mixture: Mixture, shuffled: Sequence[grain.MapDataset]) -> None:
        self._mixture = mixture
        self._shuffled = shuffled

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> int:
        number, before = self._mixture.turn(int(position))
        return self._shuffled[number][before]
