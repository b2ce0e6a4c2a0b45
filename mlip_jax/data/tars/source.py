"""The samples of tar shards as a dataset: `webdataset:PATTERN`, on this machine or in a bucket."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from mlip_jax.core.texts import shown, whole
from mlip_jax.data.prepare.containers import Container, opened
from mlip_jax.data.prepare.readers import Broken, InputRecord, split_of_file
from mlip_jax.data.prepare.webdataset import ANNOTATIONS, Sample, read_sample
from mlip_jax.data.sets.kinds import DatasetKind, Opening
from mlip_jax.data.sets.records import Record, shard_of
from mlip_jax.data.sets.splits import STANDARD, Choice
from mlip_jax.data.tars.index import TarIndex
from mlip_jax.data.tars.listing import Shard, Shelf, notes
from mlip_jax.data.text.captions import usable

WINDOW = 16  # shards that are mixed where config.data.window does not say
_INDEXES = 64  # that a process has in memory
_NEAR = 2  # shards that a process keeps at hand when nobody reads ahead
_SPEED = 50e6  # bytes a second at which shards come, before that is known
_HEADERS = 2**16  # bytes between members of one sample that are read with them


class TarSource:
    """Samples of tar shards. In memory is the number of samples of each shard.

    Which samples a shard holds is read when one of them is. Where the files beside a shard promise
    more samples than it has, the rest cannot be read.
    """

    class_names: tuple[str, ...] = ()
    attribution = ""
    by_content = True  # nobody has looked for equal images

    def __init__(
        self,
        name: str,
        choice: Choice,
        shelf: Shelf,
        shards: Sequence[Shard],
        counts: Sequence[int],
        *,
        window: int,
        cleaning: str,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Takes the shards of the split and the number of samples of each."""
        self.name = name
        self.split, self.parts = choice
        self.notes = notes
        self.window = window
        self.is_remote = bool(shelf.bucket)
        self._shards = shards
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._cleaning = cleaning
        self._reading = _Reading(shelf)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        record = self._read(index)
        if not record.example.image:
            raise OSError("the image is empty")
        return Record(
            image=record.example.image,
            captions=self._captions(record),
            tags=usable(record.example.tags, self._cleaning),
            label=-1,
            name=shown(record.example.name),
        )

    def name_of(self, index: int) -> str:
        """The sample's shard and its key there; of one that is not there, its place."""
        shard, place = shard_of(self, index)
        try:
            return shown(self._reading.name(self._shards[shard], place))
        except OSError:
            return f"{self._reading.shelf.shown(self._shards[shard])}[{place}]"

    def captions(self) -> Iterator[str]:
        """Every caption and tag of the split; no image is read of shards on this machine."""
        for shard, end in enumerate(self._ends.tolist()):
            self.bring(shard)
            for index in range(int(self._ends[shard - 1]) if shard else 0, end):
                try:
                    record = self._read(index, texts_alone=True)
                    texts = self._captions(record)
                except OSError:
                    continue
                yield from texts
                yield from usable(record.example.tags, self._cleaning)
            self.release(shard)

    def shard_ends(self) -> Int64[np.ndarray, " shards"]:
        """Where each shard's samples end."""
        return self._ends

    def bring(self, shard: int, *, ahead: bool = False) -> None:
        """Has a shard and its index on this machine."""
        self._reading.bring(self._shards[shard], ahead=ahead)

    def release(self, shard: int) -> None:
        """Says that a shard is not needed for long."""
        self._reading.shelf.release(self._shards[shard])

    def _read(self, index: int, *, texts_alone: bool = False) -> InputRecord:
        shard, place = shard_of(self, index)
        return self._reading.record(self._shards[shard], place, texts_alone)

    def _captions(self, record: InputRecord) -> tuple[str, ...]:
        """Its captions, or else classes that are words: numbers say nothing."""
        words = (label for label in record.example.labels if not label.isdigit())
        captions = usable(record.example.captions, self._cleaning) or usable(words, self._cleaning)
        if not captions:
            raise OSError("it has no caption")
        return captions


class _Reading:
    """Reads samples: of a shard that is here by its file, of another by ranges or after it came.

    A few samples come sooner by themselves, and many with the whole shard. It is brought when the
    time that was spent on single samples is what it takes: that is at most twice the shorter time.
    """

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._lock = threading.Lock()
        self._building = threading.Lock()  # threads of a process would write to one draft
        self._indexes: OrderedDict[Shard, TarIndex] = OrderedDict()
        self._spent: dict[Shard, float] = {}  # seconds, on samples of shards that are not here
        self._speed = _SPEED
        self._near: OrderedDict[Shard, None] = OrderedDict()  # brought when one was asked for

    def __reduce__(self) -> tuple[type[_Reading], tuple[Shelf]]:
        return _Reading, (self.shelf,)

    def bring(self, shard: Shard, *, ahead: bool = False) -> Path:
        """The shard's file, brought where it is not here, and its index made."""
        path = self.shelf.find(shard)
        if path is None:
            start = time.monotonic()
            path = self.shelf.bring(shard, ahead=ahead)
            took = max(time.monotonic() - start, 1e-3)
            self._speed = (self._speed + shard.size / took) / 2
        self.index(shard)
        return path

    def index(self, shard: Shard) -> TarIndex:
        """The shard's index; it is brought where there is none."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        index = self.shelf.kept_index(shard)
        if index is None:
            self.shelf.bring(shard)  # not under the lock: it may take long
            with self._building:
                index = self.shelf.index(shard)
        with self._lock:
            self._indexes[shard] = index
            if len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        return index

    def name(self, shard: Shard, place: int) -> str:
        """A sample's name; raises OSError where there is none."""
        index = self.index(shard)
        if place >= len(index):
            raise OSError(f"{self.shelf.shown(shard)} has {len(index):,} samples alone")
        return f"{self.shelf.shown(shard)}/{index.key(place)}"

    def record(self, shard: Shard, place: int, texts_alone: bool) -> InputRecord:
        """A sample.

        Raises:
          OSError: when there is none, or it cannot be read.
          RunError: when its shard cannot be had.
        """
        name = self.name(shard, place)
        sample = self.index(shard).sample(place)
        if texts_alone:
            texts = {end: at for end, at in sample.members.items() if end in ANNOTATIONS}
            sample = sample._replace(image="", members=texts)
        path = self.shelf.find(shard)
        if path is None and self._is_dear(shard):
            path = self._bring_near(shard)
        record = None if path is None else self._from_file(path, name, sample)
        if record is None:
            start = time.monotonic()
            record = read_sample(self._from_afar(shard, sample), name, sample, {})
            with self._lock:
                before = self._spent.get(shard, 0.0)
                self._spent[shard] = before + time.monotonic() - start
        if isinstance(record, Broken):
            raise OSError(record.reason)
        return record

    def _from_file(self, path: Path, name: str, sample: Sample) -> InputRecord | Broken | None:
        """A sample of a shard that is here; None: it has just made room for another."""
        try:
            with opened(path) as container:
                return read_sample(container, name, sample, {})
        except FileNotFoundError:
            if not self.shelf.bucket:
                raise
            return None

    def _is_dear(self, shard: Shard) -> bool:
        with self._lock:
            return self._spent.get(shard, 0.0) > shard.size / self._speed

    def _bring_near(self, shard: Shard) -> Path:
        path = self.bring(shard)
        with self._lock:
            self._spent.pop(shard, None)
            self._near[shard] = None
            self._near.move_to_end(shard)
            far = self._near.popitem(last=False)[0] if len(self._near) > _NEAR else None
        if far is not None:
            self.shelf.release(far)
        return path

    def _from_afar(self, shard: Shard, sample: Sample) -> Container:
        """What holds a sample's members, read in one go if they are neighbours."""
        spans = sample.members.values()
        start = min(offset for offset, _ in spans)
        end = max(offset + size for offset, size in spans)
        if end - start <= sum(size for _, size in spans) + _HEADERS:
            content = self.shelf.part(shard, start, end)

            def read(size: int, offset: int) -> bytes:
                return content[offset - start : offset - start + size]

        else:

            def read(size: int, offset: int) -> bytes:
                return self.shelf.part(shard, offset, offset + size)

        return Container(read, lambda offset: offset, packed=False)


def open_tars(where: str, opening: Opening) -> TarSource:
    """Opens tar shards as they are. Captions and tags are cleaned.

    Splits are told by the names of the files, as by prepare. Samples without a caption, and what is
    broken in a shard, cannot be read: where nothing but the tar files says how many samples they
    have, broken ones are found now, and left out.

    Args:
      where: a tar file, a folder, or a pattern with *, ?, {a,b} or {000..123}; a path or a URL.
      opening: what is asked.

    Raises:
      MissingSplit: when no file is of this split.
      UserError: when there is no such file, one is packed, or too much of them is broken.
    """
    shelf = Shelf(where, opening.cache_dir)
    by_split: dict[str, list[Shard]] = {}
    for shard in shelf.matching(where):
        by_split.setdefault(split_of_file(Path(shard.name)), []).append(shard)
    choice = STANDARD.choose(where, opening.wanted, by_split)
    shards = [shard for part in choice.parts for shard in by_split[part]]
    found = shelf.findings(shards, lambda line: print(f"{where}: {line}", file=sys.stderr))
    return TarSource(
        _name(where),
        choice,
        shelf,
        shards,
        [each.samples for each in found],
        window=WINDOW if opening.window < 0 else opening.window,
        cleaning=opening.cleaning,
        notes=notes(found, opening.max_skipped_share),
    )


def _name(where: str) -> str:
    """What the dataset is called: the file or folder, or the folder that a pattern is for."""
    parts = [part for part in where.split("/") if part and not set(part) & set("*?[{")]
    last = parts[-1] if parts and parts[-1] not in (".", "..", "~") else Path.cwd().name
    return whole(last.removesuffix(".tar"))


KIND = DatasetKind(open_tars, "PATH")
