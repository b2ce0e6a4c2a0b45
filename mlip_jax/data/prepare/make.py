"""One shard: its records read, looked at and written. This is what the worker processes run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TextIO

from array_record.python.array_record_module import ArrayRecordWriter

from mlip_jax.core import places
from mlip_jax.core.files import decode_json, open_lock, whole_file, write_atomically
from mlip_jax.core.texts import whole
from mlip_jax.data.batches.workers import end_with_parent
from mlip_jax.data.images.limits import UnreadableImage
from mlip_jax.data.prepare.examine import Examined, examine
from mlip_jax.data.prepare.readers import Broken, InputRecord, Reader
from mlip_jax.data.sets.shards import SHARD_SUFFIX, TEXTS_SUFFIX, Shard, pack

DRAFTS = ".prepare"  # what has been made is noted here until the index is written
SCORE_DRAFTS = "scores"  # there: what a model says of the pieces of an input
LOCK = ".lock"
# Bytes of the lock: of the process that prepares, and of its workers together. After a kill they
# may live for a moment longer than it.
MAIN_BYTE, WORKERS_BYTE = 0, 1
# A record is read alone, and images are packed already. One thread is faster than several here.
_WRITER = "group_size:1,uncompressed,max_parallelism:1"
_REPORT_EVERY = 32  # records
_COUNTS = ("captions", "latin", "resized", "animated", "image_bytes")


class Stopped(Exception):
    """The main process wants no more shards."""


@dataclass(frozen=True)
class Piece:
    """What one shard is made of."""

    name: str
    split: str
    refs: Sequence[Any]
    digest: str  # the same for the same records of the same input


@dataclass(frozen=True)
class Made:
    """A shard, and what was left out of it."""

    shard: Shard
    broken: tuple[Broken, ...]

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Made:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for other texts."""
        values = decode_json(text)
        shard = Shard.from_values(values["shard"])
        check_facts(shard)
        broken = tuple(Broken(**each) for each in values["broken"])
        if not all(isinstance(text, str) for each in broken for text in (each.name, each.reason)):
            raise ValueError("a broken record has a place and a reason, texts")
        return cls(shard, broken)


@dataclass
class Tally:
    """What the card counts."""

    captions: int = 0
    latin: int = 0  # texts that were not UTF-8
    resized: int = 0
    animated: int = 0
    image_bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    class_keys: set[str] = field(default_factory=set)
    multi_label: bool = False
    longest_caption: int = 0
    short_sides: tuple[int, int] = (0, 0)  # the smallest and the largest
    long_side: int = 0

    def add(self, record: InputRecord, image: Examined) -> None:
        """Takes a record that is kept."""
        example = record.example
        self.captions += len(example.captions)
        self.latin += record.latin
        self.resized += image.resized
        self.animated += image.animated
        self.image_bytes += len(image.data)
        self.formats[image.format] += 1
        self.modes[image.mode] += 1
        self.class_keys.update(example.labels, example.difficult)
        self.multi_label |= record.multi_label
        for caption in example.captions:
            self.longest_caption = max(self.longest_caption, len(caption))
        smallest, largest = self.short_sides
        short = image.short_side
        if not smallest <= short <= largest:
            self.short_sides = min(smallest or short, short), max(largest, short)
        self.long_side = max(self.long_side, image.long_side)

    def merge(self, facts: Mapping[str, Any]) -> None:
        """Takes what another has counted, as `facts` gives it."""
        for number in _COUNTS:
            setattr(self, number, getattr(self, number) + facts[number])
        for counter in ("formats", "modes"):
            getattr(self, counter).update(facts[counter])
        self.class_keys.update(facts["class_keys"])
        self.multi_label |= facts["multi_label"]
        self.longest_caption = max(self.longest_caption, facts["longest_caption"])
        smallest, largest = facts["short_sides"]
        if largest:
            sides = self.short_sides
            self.short_sides = min(sides[0] or smallest, smallest), max(sides[1], largest)
        self.long_side = max(self.long_side, facts["long_side"])

    def facts(self) -> dict[str, Any]:
        """As plain values, in an order of their own."""
        return {
            **{number: getattr(self, number) for number in _COUNTS},
            "formats": dict(sorted(self.formats.items())),
            "modes": dict(sorted(self.modes.items())),
            "class_keys": sorted(self.class_keys),
            "multi_label": self.multi_label,
            "longest_caption": self.longest_caption,
            "short_sides": list(self.short_sides),
            "long_side": self.long_side,
        }


def check_facts(shard: Shard) -> None:
    """Raises ValueError unless a shard's facts are what `Tally.facts` gives."""
    facts, kinds = dict(shard.facts), Tally().facts()
    inner = {"formats": _is_count, "modes": _is_count, "class_keys": _is_text}
    inner["short_sides"] = _is_count
    right = facts.keys() == kinds.keys() and all(
        type(facts[key]) is type(kind) and (type(kind) is not int or _is_count(facts[key]))
        for key, kind in kinds.items()
    )
    if right:
        values = {key: facts[key] for key in inner}
        right = len(values["short_sides"]) == 2 and all(
            check(each)
            for key, check in inner.items()
            for each in (values[key].values() if isinstance(values[key], dict) else values[key])
        )
    if not right:
        raise ValueError(f'"facts" of the shard {shard.name} are not counts of it')


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _no_report(records: int) -> None:
    """Ignores the number of records."""


class Maker:
    """Makes shards in a folder."""

    def __init__(self, reader: Reader, folder: Path, resize: int) -> None:
        """Takes where records are read, where shards go and how small images become."""
        self._reader = reader
        self._folder = folder
        self._resize = resize
        self._report: Callable[[int], None] = _no_report
        self._lock: TextIO | None = None

    def tell(self, report: Callable[[int], None]) -> None:
        """Calls `report` with the number of records that are done since the last call."""
        self._report = report

    def hold(self) -> None:
        """Locks the folder, as one of several workers, as long as this process lives."""
        self._lock = open_lock(self._folder / LOCK)
        fcntl.lockf(self._lock, fcntl.LOCK_SH, 1, WORKERS_BYTE)

    def make(self, piece: Piece) -> Made:
        """Writes a shard, whole or not at all; what is said of it is noted last.

        Raises:
          OSError: when the disk is full or cannot be written.
        """
        tally = Tally()
        broken: list[Broken] = []
        finals = [self._folder / f"{piece.name}{end}" for end in (SHARD_SUFFIX, TEXTS_SUFFIX)]
        with contextlib.ExitStack() as stack:
            records, texts = (stack.enter_context(whole_file(path)) for path in finals)
            number = self._write(piece, records, texts, tally, broken)
            shard = Shard(
                name=piece.name,
                split=piece.split,
                records=number,
                sizes=(records.stat().st_size, texts.stat().st_size) if number else (0, 0),
                sums=(checksum(records), checksum(texts)) if number else ("", ""),
                made_of=piece.digest,
                facts=tally.facts(),
            )
            if not number:  # no files, then
                records.unlink()
                texts.unlink()
        plain = (Broken(encoded(b.name).decode(), encoded(b.reason).decode()) for b in broken)
        made = Made(shard, tuple(plain))
        write_atomically(self._folder / DRAFTS / f"{piece.name}.json", made.to_json())
        return made

    def hand_over(self, made: Made) -> None:
        """Brings a shard to the bucket where the folder is in one, and then what is noted of it."""
        for name, *_ in made.shard.files():
            places.hand_over(self._folder / name)
        places.publish(self._folder / DRAFTS / f"{made.shard.name}.json")

    def _write(
        self, piece: Piece, records: Path, texts: Path, tally: Tally, broken: list[Broken]
    ) -> int:
        number = 0
        with texts.open("wb") as texts_file, _array_record(records) as writer:
            for count, record in enumerate(self._reader.read(piece.refs), start=1):
                if isinstance(record, Broken):
                    broken.append(record)
                elif isinstance(examined := self._looked_at(record), Broken):
                    broken.append(examined)
                else:
                    packed, line = pack(record.example, examined.data)
                    writer.write(packed)
                    texts_file.write(line)
                    tally.add(record, examined)
                    number += 1
                if count % _REPORT_EVERY == 0:
                    self._report(_REPORT_EVERY)
        self._report(len(piece.refs) % _REPORT_EVERY)
        return number

    def _looked_at(self, record: InputRecord) -> Examined | Broken:
        example = record.example
        place = record.place or example.name
        if not (example.captions or example.labels or record.multi_label):
            return Broken(place, "has neither caption nor class")
        try:
            return examine(example.image, self._resize)
        except UnreadableImage as error:
            return Broken(place, str(error))


def encoded(text: str) -> bytes:
    """A text in UTF-8; half of a surrogate pair, as in a file's name of other bytes, is a "?"."""
    return whole(text).encode("utf-8")


@contextlib.contextmanager
def _array_record(path: Path) -> Iterator[ArrayRecordWriter]:
    """A writer; its RuntimeError becomes an OSError that says whether the disk is full."""
    try:
        writer = ArrayRecordWriter(str(path), _WRITER)
        try:
            yield writer
        finally:
            writer.close()
    except RuntimeError as error:
        full = os.strerror(errno.ENOSPC) in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from None


def checksum(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_maker: Maker | None = None  # of this worker process


def start_worker(maker: Maker, done: Synchronized[int], stop: Event) -> None:
    """Makes this process a worker, which adds to `done` and ends its shard when `stop` is set."""
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process decides
    end_with_parent()

    def report(records: int) -> None:
        with done.get_lock():
            done.value += records
        if stop.is_set():
            raise Stopped

    maker.hold()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(0)  # it was killed before the lock was taken: another one may be at work by now
    maker.tell(report)
    _maker = maker


def make_in_worker(piece: Piece) -> Made:
    """A shard, made by this process."""
    assert _maker is not None  # start_worker has run
    return _maker.make(piece)
