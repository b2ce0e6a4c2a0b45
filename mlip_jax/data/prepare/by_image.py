"""Records of equal images become one, wherever in the input they lie."""

from __future__ import annotations

import itertools
import pickle
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from mlip_jax.data.prepare.readers import Broken, InputRecord, Reader
from mlip_jax.data.sets.one_image import bits_of
from mlip_jax.data.sets.shards import Example

_AT_ONCE = 4096  # records whose refs are held; their images come one by one
_LINE = 30.0  # seconds between two lines about how far it is


class _Texts(NamedTuple):
    """What another record says about the same image."""

    captions: tuple[str, ...]
    tags: tuple[str, ...]
    latin: int


class _Merged(NamedTuple):
    """A record, and the texts of those that are merged into it."""

    ref: Any
    more: tuple[_Texts, ...]


class ByImage(Reader):
    """Another input whose records of equal image bytes, split and classes are one record.

    Captions and tags come together in the order of the input. Records without a caption are
    examples of a class and stay as they are. First every image is glanced at, then those are
    read whole of which a glance does not tell that they differ: an input without equal images is
    read once.
    """

    def __init__(self, reader: Reader, console: Console) -> None:
        """Takes the input, and where a line goes when looking takes long."""
        self._reader = reader
        self._console = console
        self._found: list[dict[int, dict[int, _Texts]]] = []  # of all walks, once one has looked
        self._merged = self._images = 0
        self.class_names = reader.class_names
        self.multi_label = reader.multi_label
        self.attribution = reader.attribution

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_console": None, "_found": []}  # the workers only read

    def again(self) -> ByImage:
        """The same, for one more walk: before this one, and what it finds is known there."""
        other = ByImage(self._scout(), self._console)
        other._found = self._found
        return other

    def files(self) -> Sequence[Path]:
        """The input's."""
        return self._reader.files()

    def shown(self, file: Path) -> str:
        """The input's."""
        return self._reader.shown(file)

    def total(self) -> int | None:
        """The input's, less those that are merged."""
        total = self._reader.total()
        return total if total is None else total - self._merged

    def notes(self) -> Iterable[str]:
        """The input's, and how many records were merged."""
        yield from self._reader.notes()
        if self._merged:
            images = f"{self._images:,} image{'s' if self._images > 1 else ''}"
            yield (
                f"{self._merged + self._images:,} records are of {images}: records of equal images "
                "are one"
            )

    def refs(self) -> Iterator[tuple[str, Any]]:
        """The input's refs, without those that are merged into an earlier one."""
        if not self._found:
            self._found.append(self._equal_images(self._alike()) if self._reader.repeats else {})
        more = self._found[0]
        merged = {row for others in more.values() for row in others}
        self._merged, self._images = len(merged), len(more)
        for row, (split, ref) in enumerate(self._reader.refs()):
            if row in more:
                yield split, _Merged(ref, tuple(more[row].values()))
            elif row not in merged:
                yield split, ref

    def read(self, refs: Sequence[Any]) -> Iterator[InputRecord | Broken]:
        """The input's records, with the texts of those that are merged into them."""
        plain = [ref.ref if isinstance(ref, _Merged) else ref for ref in refs]
        for ref, record in zip(refs, self._reader.read(plain), strict=True):
            if isinstance(ref, _Merged) and isinstance(record, InputRecord):
                yield _with(record, ref.more)
            else:
                yield record

    def _alike(self) -> set[int]:
        """The rows that another row's image may equal, by a glance."""
        scout = self._scout()
        keys, rows = array("Q"), array("q")
        for first, chunk in self._chunks(scout):
            for place, glance in enumerate(scout.glances([ref for _, ref in chunk])):
                if glance:
                    keys.append(bits_of(b"\0".join((chunk[place][0].encode(), glance))))
                    rows.append(first + place)
        _, inverse, counts = np.unique(
            np.array(keys, np.uint64), return_inverse=True, return_counts=True
        )
        return set(np.array(rows, np.int64)[counts[inverse] > 1].tolist())

    def _equal_images(self, rows: set[int]) -> dict[int, dict[int, _Texts]]:
        """Of these rows, the first of each image, and the texts of its others by their rows."""
        firsts: dict[bytes, int] = {}
        more: dict[int, dict[int, _Texts]] = {}
        if not rows:
            return more
        scout = self._scout()
        for first, chunk in self._chunks(scout):
            places = [place for place in range(len(chunk)) if first + place in rows]
            records = scout.read([chunk[place][1] for place in places])
            for place, record in zip(places, records, strict=True):
                if isinstance(record, Broken) or not record.example.captions:
                    continue
                key = _digest(chunk[place][0], record.example)
                earliest = firsts.setdefault(key, first + place)
                if earliest != first + place:
                    texts = _Texts(record.example.captions, record.example.tags, record.latin)
                    more.setdefault(earliest, {})[first + place] = texts
        return more

    def _scout(self) -> Reader:
        """The input once more: its counts are of one round."""
        scout: Reader = pickle.loads(pickle.dumps(self._reader))
        return scout

    def _chunks(self, scout: Reader) -> Iterator[tuple[int, list[tuple[str, Any]]]]:
        """Refs, some at a time, with the number of the first."""
        refs, told = scout.refs(), time.monotonic()
        for first in itertools.count(step=_AT_ONCE):
            chunk = list(itertools.islice(refs, _AT_ONCE))
            if not chunk:
                return
            yield first, chunk
            if time.monotonic() - told > _LINE:
                told = time.monotonic()
                self._console.print(f"looking for equal images: {first + len(chunk):,} records")


def _digest(split: str, example: Example) -> bytes:
    named = repr((split, example.labels, example.difficult)).encode("utf-8", "backslashreplace")
    return blake2b(example.image, digest_size=16, key=blake2b(named).digest()).digest()


def _with(record: InputRecord, more: Sequence[_Texts]) -> InputRecord:
    example = record.example
    captions = (example.captions, *(texts.captions for texts in more))
    tags = (example.tags, *(texts.tags for texts in more))
    merged = replace(
        example,
        captions=tuple(dict.fromkeys(itertools.chain.from_iterable(captions))),
        tags=tuple(dict.fromkeys(itertools.chain.from_iterable(tags))),
    )
    return record._replace(example=merged, latin=record.latin + sum(texts.latin for texts in more))
