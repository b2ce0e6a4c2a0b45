"""Several datasets that are trained on together, each with its share of the samples."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.records import InShards, Record, Source, shard_of

PREFIX = "mix:"
_PART = re.compile(r"(?P<spec>.+?)\*(?P<weight>[0-9.]+)(?:\+|$)")
_LONGEST_PERIOD = 10_000
_NEAR = 10  # neighbours that may stand for a record of a shard


class Part(NamedTuple):
    """A dataset of a mixture."""

    spec: str
    weight: Fraction


def is_mixture(spec: str) -> bool:
    """Whether a spec names several datasets."""
    return spec.startswith(PREFIX)


def parse(spec: str) -> tuple[Part, ...]:
    """The parts of "mix:SPEC*WEIGHT+SPEC*WEIGHT", such as "mix:coco*0.7+jsonl:pairs.jsonl*0.3".

    Raises:
      UserError: for anything else, or a weight that is not above 0.
    """
    text = spec.removeprefix(PREFIX)
    parts: list[Part] = []
    position = 0
    while position < len(text) or not parts:
        match = _PART.match(text, position)
        try:
            weight = Fraction(match["weight"]) if match else Fraction(0)
        except ValueError:
            weight = Fraction(0)
        if match is None or weight <= 0 or match["spec"].startswith(PREFIX):
            raise UserError(
                f"dataset {spec!r}: expected mix:SET*WEIGHT+SET*WEIGHT with weights above 0, such "
                f"as mix:coco*0.7+jsonl:pairs.jsonl*0.3; {text[position:]!r} is not that"
            )
        parts.append(Part(match["spec"], weight))
        position = match.end()
    return tuple(parts)


class Mixture:
    """Datasets one after the other, as one source; and which of them stands where in the samples.

    The datasets take turns in a period that repeats, as evenly as their weights allow: the largest
    lag behind its share goes first. With weights whose smallest whole multiples add up to more than
    10,000, shares are rounded to a ten-thousandth.
    """

    split = "train"

    def __init__(self, sources: Sequence[Source], weights: Sequence[Fraction]) -> None:
        """Takes opened datasets and their weights."""
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        self._turns = _turns(weights)
        drawn = self._turns[:, None] == np.arange(len(sources))
        self._drawn = np.concatenate([np.zeros((1, len(sources)), int), np.cumsum(drawn, 0)])
        names: list[str] = []
        for source in sources:
            number = sum(name.partition("#")[0] == source.name for name in names) + 1
            names.append(source.name if number == 1 else f"{source.name}#{number}")
        self._names = tuple(names)
        self.name = "+".join(self._names)
        self.parts = tuple(
            f"{name}/{part}"
            for name, source in zip(names, sources, strict=True)
            for part in source.parts
        )
        first = sources[0].class_names  # of other datasets, labels mean something else
        same = all(source.class_names == first for source in sources)
        self.class_names = first if same else ()
        credits = dict.fromkeys(source.attribution for source in sources if source.attribution)
        self.attribution = "\n".join(credits)
        shares = self._drawn[-1] / len(self._turns)
        notes: list[str] = []
        for name, source, share in zip(names, sources, shares, strict=True):
            notes.append(f"{name}: {len(source):,} images, {share:.2%} of the samples")
            notes += source.notes
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        number, place = self.find(index)
        record = self._sources[number][place]
        return record if self.class_names else replace(record, label=-1)

    def name_of(self, index: int) -> str:
        """The record's name in its dataset."""
        number, place = self.find(index)
        return self._sources[number].name_of(place)

    def captions(self) -> Iterator[str]:
        """Every caption and tag, one dataset after the other, whatever their weights."""
        for source in self._sources:
            yield from source.captions()

    @property
    def sources(self) -> tuple[Source, ...]:
        """The datasets."""
        return self._sources

    def drawn(self, number: int) -> Int[np.ndarray, " turns"]:
        """How many samples of a dataset stand before each turn of a period, and in all of it."""
        return self._drawn[:, number]

    def sets(self) -> list[range]:
        """The indices of each dataset."""
        ends = self._ends.tolist()
        return [range(first, end) for first, end in itertools.pairwise([0, *ends])]

    def turn(self, position: int) -> tuple[int, int]:
        """Whose sample stands at a position, and how many samples of that dataset are before it."""
        periods, turn = divmod(position, len(self._turns))
        number = int(self._turns[turn])
        return number, periods * int(self._drawn[-1, number]) + int(self._drawn[turn, number])

    def samples(self, position: int) -> dict[str, int]:
        """How many of the first `position` samples are of each dataset."""
        periods, turn = divmod(position, len(self._turns))
        counts = periods * self._drawn[-1] + self._drawn[turn]
        return dict(zip(self._names, counts.tolist(), strict=True))

    def find(self, index: int) -> tuple[int, int]:
        """The dataset of a record, and the record's index there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, int(index) - self.sets()[number].start


def samples_by_set(source: Source, position: int) -> dict[str, float]:
    """{"samples/NAME": how many of the first samples are of it}; {} for a single dataset."""
    if not isinstance(source, Mixture):
        return {}
    return {f"samples/{name}": count for name, count in source.samples(position).items()}


def datasets_of(source: Source) -> tuple[Source, ...]:
    """The datasets of a mixture, or the source itself."""
    return source.sources if isinstance(source, Mixture) else (source,)


def stand_ins(source: Source, index: int, most: int) -> Iterator[int]:
    """The index and those that stand for it, one after the other, where it cannot be read.

    They are the next ones of its dataset. Where that lies in shards, of which a whole one may be
    damaged, after the first few they are at its place in the next shards.
    """
    start, part = 0, source
    if isinstance(source, Mixture):
        number, place = source.find(index)
        start, part = index - place, source.sources[number]
    neighbours = _neighbours(range(start, start + len(part)), index)
    near = list(itertools.islice(neighbours, _NEAR))
    elsewhere: Iterator[int] = iter(())
    if isinstance(part, InShards):
        places = _in_other_shards(part, index - start)
        elsewhere = (start + place for place in itertools.islice(places, most // 2))
    yield from itertools.islice(itertools.chain(near, elsewhere, neighbours), most)


def _neighbours(indices: range, index: int) -> Iterator[int]:
    for step in range(len(indices)):
        yield indices[(index - indices.start + step) % len(indices)]


def _in_other_shards(source: InShards, index: int) -> Iterator[int]:
    """The record at the same place of each next shard."""
    ends = source.shard_ends()
    shard, place = shard_of(source, index)
    for step in range(1, len(ends)):
        other = (shard + step) % len(ends)
        start = int(ends[other - 1]) if other else 0
        if size := int(ends[other]) - start:
            yield start + place % size


def _turns(weights: Sequence[Fraction]) -> Int[np.ndarray, " period"]:
    """The dataset at each turn of a period."""
    counts = _turn_counts(weights)
    credit = np.zeros(len(counts), np.int64)
    turns = np.empty(sum(counts), np.int64)
    for turn in range(len(turns)):
        credit += counts
        turns[turn] = np.argmax(credit)
        credit[turns[turn]] -= len(turns)
    return turns


def _turn_counts(weights: Sequence[Fraction]) -> list[int]:
    """Turns of each dataset in a period, at least one."""
    common = math.lcm(*(weight.denominator for weight in weights))
    counts = [int(weight * common) for weight in weights]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= _LONGEST_PERIOD:
        return counts
    return [max(1, round(count * _LONGEST_PERIOD / total)) for count in counts]
