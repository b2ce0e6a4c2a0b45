"""WebDataset tars: members that share a name up to its first dot are one record."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import MOST_BYTES
from mlip_jax.data.prepare import columns as column
from mlip_jax.data.prepare import tar
from mlip_jax.data.prepare.containers import SUFFIXES, Container, is_packed, opened
from mlip_jax.data.prepare.readers import (
    MOST_TEXT,
    Broken,
    InputRecord,
    Reader,
    decode_text,
    glance_at_part,
    keys_of,
    parse_object,
    split_of_file,
    texts_of,
)
from mlip_jax.data.sets.files import IMAGE_SUFFIXES, files_below, is_hidden
from mlip_jax.data.sets.shards import Example

# As webdataset tells the key from the extension; "./" and the like are left out before.
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]*)")
_TEXTS = ("txt", "text", "caption", "captions")
_LABELS = ("cls", "label", "class")
_JSON = "json"
ANNOTATIONS = frozenset((*_TEXTS, *_LABELS, _JSON))
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MOST_FILES = 1_000_000
_SHOWN = 10


class _Sample(NamedTuple):
    """The members of a key in one of the tar files: ending -> offset, size."""

    tar: int
    key: str
    image: str  # the ending of its image; "": it has none
    members: dict[str, tuple[int, int]]

    def is_whole(self) -> bool:
        """Whether there is an image and something is said about it."""
        return bool(self.image) and not ANNOTATIONS.isdisjoint(self.members)


Sample = _Sample  # its own name stands in the digests of prepared shards


def sample_of(number: int, key: str, members: dict[str, tuple[int, int]]) -> Sample:
    """Of several images that with the plainest ending is taken, such as "jpg"."""
    images = [ending for ending in members if ending not in ANNOTATIONS]
    image = min(images, key=lambda ending: ending.count("."), default="")
    return _Sample(number, key, image, members)


class WebDataset(Reader):
    """Tar files, whose headers are read one after the other."""

    repeats = True

    def __init__(self, where: str, columns: Mapping[str, str], split: str) -> None:
        """Takes a tar file, a folder with some, or a pattern with *, ?, {a,b} or {000..123}.

        Files may be in gzip.

        Raises:
          UserError: when there is no such file.
        """
        self._files = find_files(where, *SUFFIXES)
        self._splits = [split or split_of_file(file) for file in self._files]
        self._columns = dict(columns)
        self._others: Counter[str] = Counter()
        self._twice = 0
        self._cut, self._first_cut = 0, ""  # texts whose keys have dots, and the first one's place
        self._seen = self._scanned = 0
        self._sizes = [file.stat().st_size for file in self._files]

    def files(self) -> Sequence[Path]:
        """The tar files."""
        return self._files

    def total(self) -> int | None:
        """By the share of the bytes that are scanned."""
        return self._seen * sum(self._sizes) // self._scanned if self._scanned else None

    def notes(self) -> Iterable[str]:
        """Members that are of no use, and keys that came twice."""
        if self._others:
            most = ", ".join(f"{end} ({n:,})" for end, n in self._others.most_common(_SHOWN))
            more = ", ..." if len(self._others) > _SHOWN else ""
            number = self._others.total()
            are = "member is" if number == 1 else "members are"
            yield f"{number:,} {are} neither image nor text: {most}{more}"
        if self._cut:
            are = "text is" if self._cut == 1 else "texts are"
            yield (
                f"{self._cut:,} {are} left out, since names are cut at their first dot: the first "
                f"is {self._first_cut}; keys must have no dots"
            )
        if self._twice:
            keys = "key" if self._twice == 1 else "keys"
            yield f"{self._twice:,} {keys} came twice in a tar file; both records are kept"

    def refs(self) -> Iterator[tuple[str, Any]]:
        """A Sample or Broken each."""
        done = 0
        for number, (file, split, size) in enumerate(
            zip(self._files, self._splits, self._sizes, strict=True)
        ):
            for ref in self._samples(number, file):
                self._seen += 1
                if isinstance(ref, _Sample):
                    end = sum(next(reversed(ref.members.values())))
                    self._scanned = done + min(end, size)  # what is packed has more than its size
                yield split, ref
            done += size
            self._scanned = done

    def _samples(self, number: int, file: Path) -> Iterator[Sample | Broken]:
        keys: set[int] = set()  # hashes, of this tar file
        waiting: dict[str, dict[str, tuple[int, int]]] = {}  # not whole: members are not adjacent
        # Members of a packed file that lie apart could only be read by unpacking again and again.
        may_lie_apart = not is_packed(file)
        for sample in _grouped(number, self._useful_members(file)):
            if isinstance(sample, Broken):
                yield sample
                continue
            if not may_lie_apart and not sample.is_whole():
                yield _not_whole(file, sample, " beside it, as it must in a packed tar file")
                continue
            if not sample.is_whole():
                former = waiting.pop(sample.key, {})
                if former.keys() & sample.members.keys():
                    yield _not_whole(file, sample_of(number, sample.key, former))
                    former = {}
                sample = sample_of(number, sample.key, former | sample.members)
                if not sample.is_whole():
                    waiting[sample.key] = sample.members
                    continue
            self._twice += hash(sample.key) in keys
            keys.add(hash(sample.key))
            if len(sample.members) > 2:
                self._others.update(
                    e for e in sample.members if e not in ANNOTATIONS | {sample.image}
                )
            yield sample
        for key, members in waiting.items():
            yield _not_whole(file, sample_of(number, key, members))

    def _useful_members(self, file: Path) -> Iterator[tuple[str, str, tar.Member] | Broken]:
        """Key, ending and member of what may belong to a record."""
        for member in tar.members(file):
            if isinstance(member, Broken):
                yield member
                continue
            name = member.name
            if "./" in name or "//" in name:
                name = "/".join(part for part in name.split("/") if part not in ("", "."))
            if is_hidden(name):
                self._others["hidden"] += 1
                continue
            match = _NAME.fullmatch(name)
            key, ending = match.groups() if match else ("", "")
            ending = ending.lower()
            plain = ending.rpartition(".")[2]
            if match and (ending in ANNOTATIONS or f".{plain}" in IMAGE_SUFFIXES):
                yield key, ending, member
            elif match and plain in ANNOTATIONS:
                self._cut += 1
                self._first_cut = self._first_cut or f"{file}/{name}"
            else:
                self._others[plain or "without a key"] += 1

    def read(self, refs: Sequence[Sample | Broken]) -> Iterator[InputRecord | Broken]:
        """Reads the members by their offsets."""
        for number, group in itertools.groupby(refs, lambda ref: getattr(ref, "tar", None)):
            if number is None:
                yield from cast("Iterator[Broken]", group)
                continue
            path = self._files[number]
            samples = cast("list[Sample]", list(group))
            try:
                with opened(path) as container:
                    for sample in samples:
                        yield read_sample(container, f"{path}/{sample.key}", sample, self._columns)
            except OSError as error:  # of `opened`
                for sample in samples:
                    yield Broken(f"{path}/{sample.key}", f"cannot read: {error.strerror}")

    def glances(self, refs: Sequence[Sample | Broken]) -> Iterator[bytes]:
        """By the middle of the images; what is packed is read whole."""
        for number, group in itertools.groupby(refs, lambda ref: getattr(ref, "tar", None)):
            samples = list(group)
            if number is None or is_packed(self._files[number]):
                yield from super().glances(samples)
                continue
            with contextlib.ExitStack() as stack:
                try:
                    container = stack.enter_context(opened(self._files[number]))
                except OSError:
                    yield from itertools.repeat(b"", len(samples))
                    continue
                for sample in cast("list[Sample]", samples):
                    yield glance_at_part(container.read, *sample.members[sample.image])


def read_sample(
    container: Container, name: str, sample: Sample, columns: Mapping[str, str]
) -> InputRecord | Broken:
    """The record of a sample, or why there is none.

    Args:
      container: the tar file.
      name: the record's.
      sample: where it lies.
      columns: the roles of the keys of its JSON; see `columns.read_columns`.
    """
    try:
        return _from_contents(name, sample, _contents(container, sample), columns)
    except (ValueError, OSError) as error:
        return Broken(name, str(error))


def _from_contents(
    name: str, sample: Sample, contents: Mapping[str, bytes], columns: Mapping[str, str]
) -> InputRecord:
    captions: list[str] = []
    labels: list[str] = []
    latin = 0
    for ending in _TEXTS:
        if ending in contents:
            text, other = decode_text(contents[ending])
            captions += texts_of(text, "caption")
            latin += other
    for ending in _LABELS:
        if ending in contents:
            text, _ = decode_text(contents[ending])
            labels += keys_of(int(text) if re.fullmatch(r"\s*-?\d{1,18}\s*", text) else text)
    tags: tuple[str, ...] = ()
    multi_label = False
    if _JSON in contents:
        values, other = parse_object(contents[_JSON])
        record = column.example(values, columns, name, b"", int(other))
        captions += record.example.captions
        labels = labels or list(record.example.labels)
        tags, multi_label, latin = record.example.tags, record.multi_label, latin + other
    distinct = tuple(dict.fromkeys(captions))
    image = contents.get(sample.image, b"")
    return InputRecord(Example(name, image, distinct, tags, tuple(labels)), latin, multi_label)


def _contents(container: Container, sample: Sample) -> dict[str, bytes]:
    """What of a record is read, by its endings; in the order of the file."""
    contents = {}
    for ending, (offset, size) in sample.members.items():
        if ending != sample.image and ending not in ANNOTATIONS:
            continue
        most = MOST_TEXT if ending in ANNOTATIONS else MOST_BYTES
        if size > most:
            raise ValueError(
                f"its .{ending} has {size:,} bytes, at most {most:,} are read: refused"
            )
        contents[ending] = container.read(size, offset)
        if len(contents[ending]) < size:
            raise ValueError(f"its .{ending} is cut short")
    return contents


def _grouped(
    number: int, entries: Iterable[tuple[str, str, tar.Member] | Broken]
) -> Iterator[Sample | Broken]:
    """Neighbours of one key; an ending that comes again begins another record."""
    key = ""
    members: dict[str, tuple[int, int]] = {}
    for each in entries:
        if isinstance(each, Broken):
            yield each
            continue
        if members and (each[0] != key or each[1] in members):
            yield sample_of(number, key, members)
            members = {}
        key, ending, member = each
        members[ending] = (member.offset, member.size)
    if members:
        yield sample_of(number, key, members)


def _not_whole(file: Path, sample: Sample, where: str = "") -> Broken:
    reason = "has no image" if not sample.image else "has no caption, class or JSON"
    cut = ""
    if "." in sample.image:
        name = f"{sample.key}.{sample.image}"
        cut = f": the name {name} is cut at its first dot, to the key {sample.key}"
    return Broken(f"{file}/{sample.key}", reason + where + cut)


def find_files(where: str, *suffixes: str) -> list[Path]:
    """The files that a pattern names, or those with these suffixes in a folder and below, sorted.

    Raises:
      UserError: when there is none.
    """
    files: list[Path] = []
    for number, pattern in enumerate(expanded(os.path.expanduser(where))):
        if number == _MOST_FILES:
            raise UserError(f"{where} stands for more than {_MOST_FILES:,} files")
        path = Path(pattern)
        if os.path.isfile(pattern):  # as most are, which may be very many
            files.append(path)
        elif path.is_dir():
            below = (path / name for name in files_below(path) if name.endswith(suffixes))
            files += [file for file in below if file.is_file()]
        else:
            matches = sorted(p for p in map(Path, glob.glob(pattern)) if p.is_file())
            if not matches:
                raise UserError(f"no such file: {pattern}")
            files += matches
    if not files:
        raise UserError(f"there is no file *{' or *'.join(suffixes)} in {where}")
    return list(dict.fromkeys(files))


def expanded(pattern: str) -> Iterator[str]:
    """The patterns that {000..123} and {a,b} stand for, one by one: there may be very many."""
    match = _RANGE.search(pattern) or _CHOICE.search(pattern)
    if match is None or os.path.exists(pattern):
        yield pattern
        return
    if match.re is _RANGE:
        first, last = int(match[1]), int(match[2])
        if last < first:
            raise UserError(f"{match[0]} in {pattern}: the second number must be the larger one")
        words: Iterable[str] = (f"{i:0{len(match[1])}}" for i in range(first, last + 1))
    else:
        words = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    for word in words:
        yield from expanded(f"{before}{word}{after}")
