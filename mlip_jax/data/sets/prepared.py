"""Datasets that the subcommand prepare has written: ArrayRecord shards with an index (`shards`)."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int8, Int64

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import brief, lines, shown, whole
from mlip_jax.data.sets import shards
from mlip_jax.data.sets.files import present_names
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.records import Origin, Record, shard_of
from mlip_jax.data.sets.shards import SHARD_SUFFIX, TEXTS_SUFFIX, Example, Index, Shard
from mlip_jax.data.sets.splits import STANDARD, Choice
from mlip_jax.data.sets.stored import Shards, Store, Version
from mlip_jax.data.text.captions import usable

_SUFFIXES = (SHARD_SUFFIX, TEXTS_SUFFIX)  # of the files of a shard
_T = TypeVar("_T")
_MOST_OPEN = 256  # shards; a process may often have 1,024 files open
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class PreparedSource:
    """The records of a prepared dataset. In memory is the number of records of each shard."""

    def __init__(
        self,
        folder: Path,
        choice: Choice,
        parts: Sequence[Shard],
        index: Index,
        opening: Opening,
        bucket: Shards | None = None,
    ) -> None:
        """Takes the shards of the split that have records, and a bucket to bring them from."""
        self.name = whole(folder.resolve().name)
        self.split, self.parts = choice
        self.class_names = tuple(map(whole, index.class_names))
        self.attribution = index.attribution
        self.notes: tuple[str, ...] = ()
        self.window = max(opening.window, 0)
        self.is_remote = bucket is not None
        self.by_content = False  # preparing has found them
        self._folder = folder
        self._bucket = bucket
        self._files = [shard.files() for shard in parts] if bucket else []
        self._names = [shard.name for shard in parts]
        self._counts = [shard.records for shard in parts]
        self._ends = np.cumsum(self._counts)
        self._labels = {key: label for label, key in enumerate(index.class_keys)}
        self._cleaning = opening.cleaning
        self._readers = _Readers()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        example = self._example(index)
        labels = [self._labels[key] for key in example.labels if key in self._labels]
        return Record(
            image=example.image,
            captions=self._captions(example),
            tags=usable(example.tags, self._cleaning),
            label=labels[0] if labels else -1,
            name=shown(example.name),
            origin=self._origin(index),
        )

    def _origin(self, index: int) -> Origin:
        shard, place = shard_of(self, index)
        return Origin(self._names[shard], place)

    def name_of(self, index: int) -> str:
        """The record's name; of one that is damaged, its shard and its place there."""
        try:
            return shown(self._example(index).name)
        except OSError:
            shard, place = shard_of(self, index)
            return f"{self._path(shard)}[{place}]"

    def captions(self) -> Iterator[str]:
        """Every caption and tag of the split; no image is read."""
        for example in self._texts():
            yield from filter(None, self._captions(example))
            yield from usable(example.tags, self._cleaning)

    def shard_ends(self) -> Int64[np.ndarray, " shards"]:
        """Where each shard's records end."""
        return self._ends

    def bring(self, shard: int, *, ahead: bool = False) -> None:
        """Has a shard on this machine."""
        if self._bucket is not None:
            self._bucket.bring(*self._object(shard), ahead=ahead)

    def release(self, shard: int) -> None:
        """Says that a shard is not needed for long."""
        for number in range(len(_SUFFIXES)) if self._bucket else ():
            assert self._bucket is not None
            self._bucket.release(*self._object(shard, number))

    def _object(self, shard: int, number: int = 0) -> tuple[str, Version]:
        name, size, checksum = self._files[shard][number]
        return name, Version(size, checksum, checksum)

    def _opened(self, shard: int, open_file: Callable[[Path], _T], number: int = 0) -> _T:
        """What a function makes of a shard's file, brought where it is not here; 1: of its texts.

        Raises:
          RunError: when it cannot be had.
        """
        if self._bucket is not None:
            return self._bucket.opened(*self._object(shard, number), open_file)
        return open_file(self._folder / f"{self._names[shard]}{_SUFFIXES[number]}")

    def _captions(self, example: Example) -> tuple[str, ...]:
        labels = (self._labels[key] for key in example.labels if key in self._labels)
        names = (self.class_names[label] for label in labels)
        return usable(example.captions, self._cleaning) or usable(names, self._cleaning) or ("",)

    def _checked(self, example: Example) -> Example:
        """An example; raises ValueError when it does not fit the index."""
        return example

    def _texts(self) -> Iterator[Example]:
        for shard in range(len(self._names)):
            path = self._path(shard, 1)
            try:
                with self._opened(shard, _for_reading, 1) as file:
                    for line in lines(file):
                        if line.content is None:
                            raise ValueError(line.refusal)
                        yield self._checked(shards.parse_texts(line.content))
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from None
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}): prepare the dataset again") from None

    def _example(self, index: int) -> Example:
        shard, place = shard_of(self, index)
        path = file = self._path(shard)
        if self._bucket is not None:
            self._bucket.find(*self._object(shard))  # which notes that it is needed
            file = str(self._bucket.path(*self._object(shard)))
        open_reader = partial(self._opened, shard, partial(_reader, self._counts[shard]))
        try:
            record = self._readers.read(file, place, open_reader)
            return self._checked(shards.unpack(record))
        # The library raises RuntimeError for a block whose checksum is wrong.
        except (RuntimeError, IndexError, ValueError, FileNotFoundError) as error:
            raise OSError(f"{path} is damaged at record {place}: {error}") from None

    def _path(self, shard: int, number: int = 0) -> str:
        """What a shard is called; 1: its texts."""
        folder = self._folder if self._bucket is None else self._bucket.url
        return f"{folder}/{self._names[shard]}{_SUFFIXES[number]}"


class MultiLabelPreparedSource(PreparedSource):
    """Records of any number of classes each."""

    def targets(self) -> Int8[np.ndarray, "images classes"]:
        """1 where an image shows a class, -1 where not, 0 where too difficult to count."""
        return np.stack([self._row(example) for example in self._texts()])

    def __getitem__(self, index: int) -> Record:
        example = self._example(index)
        captions = usable(example.captions, self._cleaning) or present_names(
            self._row(example), self.class_names, self._cleaning
        )
        tags = usable(example.tags, self._cleaning)
        name, origin = shown(example.name), self._origin(index)
        return Record(example.image, captions, tags, -1, name, origin)

    def _checked(self, example: Example) -> Example:
        unknown = next((k for k in example.labels + example.difficult if k not in self._labels), "")
        if unknown:
            raise ValueError(f"the class {brief(unknown)} is not in the index")
        return example

    def _row(self, example: Example) -> Int8[np.ndarray, " classes"]:
        row = np.full(len(self.class_names), -1, np.int8)
        row[[self._labels[key] for key in example.difficult]] = 0
        row[[self._labels[key] for key in example.labels]] = 1
        return row


class _Readers:
    """Open shards of this process, those that were used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, ArrayRecordReader] = OrderedDict()

    def __reduce__(self) -> tuple[type[_Readers], tuple[()]]:
        return _Readers, ()  # open files stay in their process

    def read(self, path: str, place: int, open_reader: Callable[[], ArrayRecordReader]) -> bytes:
        """A record of the shard at a path.

        Raises:
          RuntimeError, IndexError, ValueError: when it cannot be read; what `open_reader` raises.
        """
        with self._lock:
            reader = self._open.get(path)
        if reader is None:
            reader = open_reader()  # not under the lock: the shard may have to be brought
        with self._lock:
            if path not in self._open:
                for gone in [one for one in self._open if not os.path.exists(one)]:
                    del self._open[gone]  # its space on the disk is free then
                self._open[path] = reader
                # One that another thread still reads from closes when that is done.
                if len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
        return reader.read([place])[0]


def _reader(count: int, path: Path) -> ArrayRecordReader:
    """Opens a shard that has `count` records.

    Raises:
      FileNotFoundError, RuntimeError, ValueError: when it cannot be read, or has another number.
    """
    os.stat(path)  # of a missing file the library tells in other words
    reader = ArrayRecordReader(str(path), _RANDOM_ACCESS)
    if reader.num_records() != count:
        raise ValueError(f"it has {reader.num_records()} records, not {count}")
    return reader


def _for_reading(path: Path) -> BinaryIO:
    return path.open("rb")


def open_prepared(folder: Path, opening: Opening) -> PreparedSource:
    """Opens what `prepare --out=FOLDER` has written. Captions and tags are cleaned.

    That no shard is missing or cut short is checked by their sizes. `prepare --check=FOLDER`
    compares the checksums.

    Args:
      folder: of the dataset.
      wanted: the split.
      max_skipped_share: not used: what could not be used was left out at the preparation.
      cleaning: one of captions.CLEANINGS.

    Raises:
      MissingSplit: when it has no such split.
      UserError: when it is no prepared dataset, or a shard is missing or of another size.
    """
    index = shards.read_index(folder)
    check_sizes(folder, index)
    choice, parts = _choose(str(folder), index, opening)
    return _kind(index)(folder, choice, parts, index, opening)


def open_from_bucket(url: str, opening: Opening) -> PreparedSource:
    """Opens a prepared dataset in a bucket.

    The shards of the split are brought and kept here; with a window in training, each when it is
    needed. What is brought is compared with the checksums of the index.

    Raises:
      MissingSplit: when it has no such split.
      UserError: when it cannot be reached, is no prepared dataset or is damaged, and when the cache
        has no room for it.
    """
    store = Store(url, opening.cache_dir)
    store.bring_anew(shards.INDEX)
    index = shards.read_index(store.folder)
    choice, parts = _choose(url, index, opening)
    if opening.window > 0:
        bucket = Shards(url, opening.cache_dir)
        return _kind(index)(store.folder, choice, parts, index, opening, bucket)
    store.bring([file for shard in parts for file in shard.files()])
    return _kind(index)(store.folder, choice, parts, index, opening)


def _choose(place: str, index: Index, opening: Opening) -> tuple[Choice, list[Shard]]:
    """What the wanted split is made of, and its shards."""
    splits = dict.fromkeys(shard.split for shard in index.shards if shard.records)
    choice = STANDARD.choose(place, opening.wanted, splits)
    parts = [s for part in choice.parts for s in index.shards if s.split == part and s.records]
    return choice, parts


def _kind(index: Index) -> type[PreparedSource]:
    return MultiLabelPreparedSource if index.multi_label else PreparedSource


def check_sizes(folder: Path, index: Index) -> None:
    """Raises UserError, naming the shard, unless all files are there with their whole length."""
    for shard in index.shards:
        for name, size, _ in shard.files():
            try:
                actual_size = (folder / name).stat().st_size
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
            else:
                reason = f"has {actual_size:,} bytes, not {size:,}" if actual_size != size else ""
            if reason:
                raise UserError(
                    f"the prepared dataset {folder} is damaged: {name} {reason}; copy it again, or "
                    "run the prepare command that made the dataset again"
                )


KIND = by_path(open_prepared, open_from_bucket)
