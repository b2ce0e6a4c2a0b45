"""Shares of a dataset by a hash of its records' names, such as #train[:95%].

Which side a record falls on is a matter of its own name alone: it stays there when others are added
or the dataset is moved.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, Int64

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.records import InShards, MultiLabel, Record, Source

_MARKED = re.compile(r"(?P<split>[^\[\]]*)\[(?P<begin>[^:\]]*):(?P<end>[^:\]]*)\]")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
_SCALE = 2**64


class Share(NamedTuple):
    """A part of a split, from one share of it to another, in [0, 1]."""

    begin: float = 0.0
    end: float = 1.0

    def __str__(self) -> str:
        begin = f"{100 * self.begin:g}%" if self.begin else ""
        end = f"{100 * self.end:g}%" if self.end < 1 else ""
        return f"[{begin}:{end}]" if begin or end else ""

    def without_last(self, share: float) -> Share:
        """All but the last `share` of this part."""
        return Share(self.begin, self.end - share * (self.end - self.begin))

    def last(self, share: float) -> Share:
        """The last `share` of this part."""
        return Share(self.without_last(share).end, self.end)


def parse(split: str) -> tuple[str, Share]:
    """A split as it is pinned, without its share, and the share: "train[:95%]", all where none is.

    Raises:
      UserError: for brackets that hold no share.
    """
    if "[" not in split:
        return split, Share()
    match = _MARKED.fullmatch(split)
    if match:
        begin, end = _percent(match["begin"], 0.0), _percent(match["end"], 1.0)
        if begin is not None and end is not None and 0 <= begin < end <= 1:
            return match["split"], Share(begin, end)
    raise UserError(
        f"{split!r}: expected a share of a split in percent, from 0% to 100%, the smaller first, "
        "such as train[:95%] or train[95%:]"
    )


def percent(text: str) -> float | None:
    """The share that a text such as "5%" is; None for any other text."""
    match = _PERCENT.fullmatch(text.strip())
    return float(match[1]) / 100 if match else None


def _percent(text: str, missing: float) -> float | None:
    return missing if not text.strip() else percent(text)


def overlap(parts: Iterable[str], others: Iterable[str]) -> bool:
    """Whether two sources, by their `Source.parts`, may share a record."""
    return any(
        one[0] == other[0] and max(one[1].begin, other[1].begin) < min(one[1].end, other[1].end)
        for one in map(_part, parts)
        for other in map(_part, others)
    )


def _part(part: str) -> tuple[str, Share]:
    return parse(part) if _MARKED.fullmatch(part) else (part, Share())


def take(source: Source, share: Share, root: str = "") -> Source:
    """The records of a source whose names fall into a share of it.

    Args:
      source: opened.
      share: all of it gives the source back.
      root: a file or folder that the names of records may lie below; how it is called does not
        count.

    Raises:
      UserError: when no record falls there.
    """
    if share == Share():
        return source
    names = map(source.name_of, range(len(source)))
    places = np.fromiter((_place(_below(name, root)) for name in names), float, len(source))
    chosen = np.flatnonzero((places >= share.begin) & (places < share.end))
    if not len(chosen):
        raise UserError(
            f"{source.split}{share} of {source.name} is empty: none of its {len(source):,} records "
            "falls there; take a larger share"
        )
    kind: type[_Share]
    if isinstance(source, MultiLabel):
        kind = _MultiLabelShardedShare if isinstance(source, InShards) else _MultiLabelShare
    else:
        kind = _ShardedShare if isinstance(source, InShards) else _Share
    return kind(source, share, chosen)


def _place(name: str) -> float:
    """In [0, 1), by the name alone."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / _SCALE


def _below(name: str, root: str) -> str:
    if not root:
        return name
    if places.is_url(root):
        above: tuple[object, ...] = (root.rstrip("/"), root.rstrip("/").rpartition("/")[0])
    else:
        home = Path(root).expanduser()
        above = (home, home.parent)
    for folder in above:
        if name.startswith(f"{folder}/"):
            return name[len(str(folder)) + 1 :]
    return name


class _Share:
    """Some records of another source."""

    def __init__(self, source: Source, share: Share, chosen: np.ndarray) -> None:
        self._source, self._chosen = source, chosen
        self.name = source.name
        self.split = f"{source.split}{share}"
        self.parts = tuple(f"{part}{share}" for part in source.parts)
        self.class_names = source.class_names
        self.attribution = source.attribution
        self.notes = (
            *source.notes,
            f"{self.split}: {len(chosen):,} of {len(source):,} records, by their names",
        )

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._chosen[index])]

    def name_of(self, index: int) -> str:
        """The record's name in the whole source."""
        return self._source.name_of(int(self._chosen[index]))

    def captions(self) -> Iterator[str]:
        """Every caption and tag of these records alone; what cannot be read is left out."""
        for index in range(len(self)):
            try:
                record = self[index]
            except OSError:
                continue
            yield from filter(None, (*record.captions, *record.tags))


class _MultiLabelShare(_Share):
    def targets(self) -> Int8[np.ndarray, "images classes"]:
        """Those of the records here; see `MultiLabel`."""
        assert isinstance(self._source, MultiLabel)
        return self._source.targets()[self._chosen]


class _ShardedShare(_Share):
    def __init__(self, source: Source, share: Share, chosen: np.ndarray) -> None:
        super().__init__(source, share, chosen)
        assert isinstance(source, InShards)
        self._shards = source
        self._ends = np.searchsorted(chosen, source.shard_ends()).astype(np.int64)

    @property
    def window(self) -> int:
        """The whole source's."""
        return self._shards.window

    @property
    def is_remote(self) -> bool:
        """The whole source's."""
        return self._shards.is_remote

    @property
    def by_content(self) -> bool:
        """The whole source's."""
        return self._shards.by_content

    def shard_ends(self) -> Int64[np.ndarray, " shards"]:
        """Where each shard's records end among these."""
        return self._ends

    def bring(self, shard: int, *, ahead: bool = False) -> None:
        """Has a shard at hand; see `InShards`."""
        self._shards.bring(shard, ahead=ahead)

    def release(self, shard: int) -> None:
        """Says that a shard is not needed for long."""
        self._shards.release(shard)


class _MultiLabelShardedShare(_ShardedShare, _MultiLabelShare):
    pass
