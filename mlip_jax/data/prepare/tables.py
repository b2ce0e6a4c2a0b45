"""CSV, TSV and JSON Lines with paths of images: a row that is wrong is left out, no other."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import kind_of
from mlip_jax.core.texts import brief, lines, shown
from mlip_jax.data.prepare import columns as column
from mlip_jax.data.prepare.readers import (
    Broken,
    InputRecord,
    Reader,
    checked_path,
    decode_text,
    image_at,
    parse_object,
)
from mlip_jax.data.sets.splits import canonical
from mlip_jax.data.sets.table_rows import Row, TableFile, check_text


class JsonLines(Reader):
    """A JSON object a line, with the path of an image; captions, classes, tags and a split."""

    def __init__(self, where: str, columns: Mapping[str, str], split: str) -> None:
        """Takes a file. Raises UserError when it cannot be read."""
        self._path = check_text(Path(where).expanduser())
        self._columns = dict(columns)
        self._split = split
        self._size = max(1, self._path.stat().st_size)
        self._seen = self._scanned = 0

    def files(self) -> Sequence[Path]:
        """The file."""
        return (self._path,)

    def total(self) -> int | None:
        """By the share of the bytes that are scanned."""
        return self._seen * self._size // self._scanned if self._scanned else None

    def refs(self) -> Iterator[tuple[str, Any]]:
        """Offset, length and number of each line."""
        with self._path.open("rb") as file:
            for number, line in enumerate(lines(file), start=1):
                content = line.content
                if content is not None and not content.strip():
                    continue
                self._seen, self._scanned = self._seen + 1, line.offset + line.length
                split, reason = self._split or "train", ""
                if content is None:
                    reason = line.refusal
                elif not self._split and ("split" in self._columns or _may_name_split(content)):
                    split, reason = self._split_of(content)
                ref = (line.offset, line.length, number)
                yield split, Broken(f"{self._path}:{number}", reason) if reason else ref

    def _split_of(self, line: bytes) -> tuple[str, str]:
        try:
            values, _ = parse_object(line)
        except ValueError:
            return "train", ""  # reported when the line is read
        return _split(values, self._columns)

    def read(self, refs: Sequence[Any]) -> Iterator[InputRecord | Broken]:
        """Reads the lines by their offsets, and their images."""
        with self._path.open("rb") as file:
            for ref in refs:
                yield ref if isinstance(ref, Broken) else self._record(file, *ref)

    def _record(
        self, file: BinaryIO, offset: int, length: int, number: int
    ) -> InputRecord | Broken:
        place = f"{self._path}:{number}"
        try:
            file.seek(offset)
            values, latin = parse_object(file.read(length))
            image = _path_of(values, self._columns)
            place = f"{place} {shown(image)}"
            content = image_at(self._path.parent, image)
            record = column.example(values, self._columns, image, content, int(latin))
        except (ValueError, OSError) as error:
            return Broken(place, str(error))
        return record._replace(place=place)


class Table(Reader):
    """A CSV table, or one with tabs; rows of one image are one record with several captions."""

    def __init__(self, where: str, columns: Mapping[str, str], split: str) -> None:
        """Takes a file with a header; .tsv and .tab have tabs.

        Raises:
          UserError: when it cannot be read, or its header lacks an image or what is said about it.
        """
        self._path = Path(where).expanduser()
        self._table = TableFile(self._path, _decoded)
        self._columns = dict(columns)
        self._split = split
        self._count: int | None = None
        with self._path.open("rb") as file:
            self._first = self._table.header(file)
        if self._first.reason:
            raise UserError(f"{self._path}:1: {self._first.reason}")
        self._header = self._check(self._first.fields)

    def _check(self, header: list[str]) -> list[str]:
        names = [name.strip() for name in header]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{self._path}:1: the column {twice!r} occurs twice")
        chosen = {role: column.choose(role, names, self._columns) for role in column.ROLES}
        for role, name in self._columns.items():
            if not chosen[role]:
                raise UserError(
                    f"{self._path}:1: there is no column {name!r} (--columns={role}={name}), only "
                    f"{', '.join(names)}"
                )
        if not chosen["image"] or not (chosen["caption"] or chosen["label"]):
            raise UserError(
                f"{self._path}:1: needs a column file (or image, path) and a column caption (or "
                f"text, label), found {', '.join(names)[:200] or 'nothing'}; name them by "
                "--columns=image=NAME,caption=NAME"
            )
        return names

    def files(self) -> Sequence[Path]:
        """The file."""
        return (self._path,)

    def total(self) -> int | None:
        """The number of images, when the rows have been scanned."""
        return self._count

    def refs(self) -> Iterator[tuple[str, Any]]:
        """The offsets and lengths of an image's rows; of a row, some 40 bytes are kept."""
        starts, lengths, lines = array("q"), array("q"), array("q")
        keys, splits = array("Q"), array("B")
        names: dict[str, int] = {}
        broken: list[tuple[str, Broken]] = []
        with self._path.open("rb") as file:
            (image_column,) = column.choose("image", self._header, self._columns)
            for row in self._table.rows(file, self._first, self._header.index(image_column)):
                split, image, reason = self._read(row)
                if reason:
                    broken.append((split, Broken(f"{self._path}:{row.line}", reason)))
                    continue
                starts.append(row.start)
                lengths.append(row.end - row.start)
                lines.append(row.line)
                splits.append(names.setdefault(split, len(names)))
                # Of 12 million images, two share 64 bits with a chance of 4 in a million.
                digest = hashlib.blake2b(f"{split}\0{image}".encode(), digest_size=8).digest()
                keys.append(int.from_bytes(digest, "little"))
        order, groups = _by_first(np.array(keys, np.uint64))
        self._count = len(groups) + len(broken)
        yield from broken
        words = list(names)
        for rows in itertools.starmap(lambda a, b: order[a:b], groups):
            yield (
                words[splits[int(rows[0])]],
                tuple((starts[i], lengths[i], lines[i]) for i in rows.tolist()),
            )

    def _read(self, row: Row) -> tuple[str, str, str]:
        """The split and the image of a row, and what is wrong with it."""
        if row.reason:
            return self._split or "train", "", row.reason
        values = dict(zip(self._header, row.fields, strict=True))
        split, reason = (self._split, "") if self._split else _split(values, self._columns)
        try:
            return split, _path_of(values, self._columns), reason
        except ValueError as error:
            return split, "", str(error)

    def read(self, refs: Sequence[Any]) -> Iterator[InputRecord | Broken]:
        """Reads the rows by their offsets, and their images."""
        with self._path.open("rb") as file:
            for ref in refs:
                yield ref if isinstance(ref, Broken) else self._record(file, ref)

    def _record(self, file: BinaryIO, rows: Sequence[tuple[int, int, int]]) -> InputRecord | Broken:
        place = f"{self._path}:{rows[0][2]}"
        merged: dict[str, list[str]] = {}
        latin = 0
        try:
            for start, length, _ in rows:
                file.seek(start)
                text, other = decode_text(file.read(length))
                latin += other
                fields = self._table.fields(text)
                for name, value in zip(self._header, fields, strict=True):
                    merged.setdefault(name, []).append(value)
            image = _path_of({name: values[0] for name, values in merged.items()}, self._columns)
            place = f"{place} {shown(image)}"
            content = image_at(self._path.parent, image)
            record = column.example(merged, self._columns, image, content, latin)
        except (ValueError, OSError) as error:
            return Broken(place, str(error))
        return InputRecord(record.example, latin, place=place)


def _by_first(keys: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Rows in groups of one key, groups and rows in the order in which they come."""
    if not len(keys):
        return np.zeros(0, np.int64), []
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = first[inverse]
    order = np.argsort(rank, kind="stable")
    edges = np.flatnonzero(np.diff(rank[order], prepend=-1, append=-1))
    return order, list(itertools.pairwise(edges.tolist()))


def _may_name_split(line: bytes) -> bool:
    return b"split" in line.lower() or b"\\u" in line  # JSON can spell any letter by its number


def _decoded(line: bytes) -> str:
    return decode_text(line)[0]


def _split(values: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str]:
    """The split that a row names, "train" where it names none, and what is wrong with it."""
    chosen = column.choose("split", values, columns)
    value = values[chosen[0]] if chosen else None
    if value is None or value == "":
        return "train", ""
    split = canonical(value) if isinstance(value, str) else None
    return (split, "") if split else ("train", f"unknown split {brief(value)}")


def _path_of(values: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    chosen = column.choose("image", values, columns)
    if not chosen:
        raise ValueError('it names no image: "file", "image" or "path"')
    path = values[chosen[0]]
    if not isinstance(path, str):
        raise ValueError(f"the path of the image must be a text, found {kind_of(path)}")
    return checked_path(path)
