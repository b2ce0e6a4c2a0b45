"""Parquet files, and the folders that Hugging Face's `save_to_disk` writes: images in columns."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlip_jax.core.errors import UserError, first_line
from mlip_jax.core.files import decode_json, read_json
from mlip_jax.core.texts import brief
from mlip_jax.data.prepare import columns as column
from mlip_jax.data.prepare.readers import (
    Broken,
    InputRecord,
    Reader,
    checked_path,
    decode_text,
    image_at,
    split_of_file,
)
from mlip_jax.data.prepare.webdataset import find_files
from mlip_jax.data.sets.shards import is_split
from mlip_jax.data.sets.splits import canonical

# What pyarrow raises of a damaged file; the last of its columns' names.
_DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)
_BATCH = 64  # rows that are in memory at a time, where the file allows it
_BUFFER = 2**20  # bytes; without one, or with pre_buffer, a whole row group is in memory
_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"


class _Columns(Reader):
    """Rows of Arrow files, one after the other. A ref is a file's number and a row's."""

    def __init__(self, files: Sequence[Path], columns: Mapping[str, str], splits: Sequence[str]):
        """Takes files and the split of each.

        Raises:
          UserError: when a file lacks an image column or what is said about it.
        """
        self._files = list(files)
        self._splits = list(splits)
        self._columns = dict(columns)
        self._broken: dict[int, Broken] = {}
        self._rows: list[int] = []
        self.class_names: tuple[str, ...] = ()
        self._chosen: dict[str, tuple[str, ...]] = {}
        for number, file in enumerate(self._files):
            try:
                schema, rows = self._open(file)
            except _DAMAGED as error:
                self._broken[number] = Broken(str(file), f"cannot be read: {first_line(error)}")
                self._rows.append(0)
                continue
            self._rows.append(rows)
            chosen = self._choose(file, schema)
            self._chosen = self._chosen or chosen
            if chosen != self._chosen:
                raise UserError(f"{file}: has other columns than {self._files[0]}")
            self.class_names = self.class_names or self._classes(schema)
        self.repeats = bool(self._chosen.get("caption"))

    def _choose(self, file: Path, schema: pa.Schema) -> dict[str, tuple[str, ...]]:
        chosen = {role: column.choose(role, schema.names, self._columns) for role in column.ROLES}
        for role, name in self._columns.items():
            if not chosen[role]:
                raise UserError(
                    f"{file}: there is no column {name!r} (--columns={role}={name}), only "
                    f"{', '.join(schema.names)}"
                )
        images = [name for name in schema.names if _holds_images(schema.field(name).type)]
        if "image" not in self._columns:
            named = [name for name in chosen["image"] if name in images]
            chosen["image"] = tuple(named or images[:1])
        if not chosen["image"] or not (chosen["caption"] or chosen["label"]):
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise UserError(
                f"{file}: needs a column with image bytes and a column caption (or text, label); "
                f"name them by --columns=image=NAME,caption=NAME. Found {columns[:500]}"
            )
        return chosen

    def _classes(self, schema: pa.Schema) -> tuple[str, ...]:
        """The names of the classes that numbers stand for, by Hugging Face's metadata."""
        try:
            features = decode_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, ValueError, TypeError):
            features = {}
        return _class_names(features, self._chosen["label"])

    @abstractmethod
    def _open(self, file: Path) -> tuple[pa.Schema, int]:
        """The columns of a file, and how many rows it has."""

    @abstractmethod
    def _column(self, number: int, name: str) -> Iterator[pa.Scalar]:
        """The values of one column of a file."""

    @abstractmethod
    def _batches(
        self, number: int, names: list[str], first: int, end: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches that hold all rows from `first` to `end`, each with its first row's number."""

    def files(self) -> Sequence[Path]:
        """The files."""
        return self._files

    def total(self) -> int | None:
        """All rows."""
        return sum(self._rows) + len(self._broken)

    def refs(self) -> Iterator[tuple[str, Any]]:
        """Of files with a column of splits, that column alone is read."""
        for number, (split, rows) in enumerate(zip(self._splits, self._rows, strict=True)):
            if number in self._broken:
                yield split or "train", self._broken[number]
                continue
            fallback = split or split_of_file(self._files[number])
            named = self._chosen["split"] if not split else ()
            words = self._splits_of(number, named[0]) if named else ()
            for row, (word, reason) in enumerate(words):
                place = f"{self._files[number]}[{row}]"
                yield word or fallback, Broken(place, reason) if reason else (number, row)
            if not named:
                yield from ((fallback, (number, row)) for row in range(rows))

    def _splits_of(self, number: int, name: str) -> Iterator[tuple[str, str]]:
        """The split that each row names, "" for none, and what is wrong with it."""
        rows = 0
        try:
            for scalar in self._column(number, name):
                rows += 1
                try:
                    value = scalar.as_py()
                # A text that is not UTF-8, or a date that Python cannot hold.
                except (ValueError, OverflowError) as error:
                    yield "", f"the split cannot be read: {first_line(error)}"
                    continue
                split = canonical(value) if isinstance(value, str) else None
                known = split or value is None or value == ""
                yield split or "", "" if known else f"unknown split {brief(value)}"
        except _DAMAGED as error:
            reason = f"the column {name!r} cannot be read on: {first_line(error)}"
            yield from itertools.repeat(("", reason), self._rows[number] - rows)

    def read(self, refs: Sequence[Any]) -> Iterator[InputRecord | Broken]:
        """Reads the rows of the roles' columns, some at a time."""
        for number, group in itertools.groupby(
            refs, lambda ref: ref[0] if type(ref) is tuple else None
        ):
            if number is None:
                yield from group
            else:
                yield from self._records(number, [row for _, row in group])

    def _records(self, number: int, rows: list[int]) -> Iterator[InputRecord | Broken]:
        file, remaining = self._files[number], iter(rows)
        row = next(remaining, None)
        names = list(dict.fromkeys(itertools.chain.from_iterable(self._chosen.values())))
        try:
            for start, batch in self._batches(number, names, rows[0], rows[-1] + 1):
                while row is not None and start <= row < start + batch.num_rows:
                    values = {name: batch.column(name)[row - start] for name in names}
                    yield self._record(file, f"{file}[{row}]", values)
                    row = next(remaining, None)
                if row is None:
                    return
        except _DAMAGED as error:
            reason = f"the file cannot be read on: {first_line(error)}"
        else:
            reason = "the file ends before this row"
        for lost in itertools.chain(() if row is None else (row,), remaining):
            yield Broken(f"{file}[{lost}]", reason)

    def _record(
        self, file: Path, name: str, scalars: Mapping[str, pa.Scalar]
    ) -> InputRecord | Broken:
        try:
            values = {
                key: scalars[key].as_py()
                for role in ("caption", "label", "tags")
                for key in self._chosen[role]
            }
            latin = 0
            for key in self._chosen["caption"]:
                if isinstance(values[key], bytes):
                    values[key], other = decode_text(values[key])
                    latin += other
            image = _image(file.parent, scalars[self._chosen["image"][0]].as_py())
            return column.example(values, self._columns, name, image, latin)
        # as_py raises UnicodeDecodeError, a ValueError, for a text that is not UTF-8, and
        # OverflowError for a date that Python cannot hold.
        except (ValueError, OverflowError, OSError, pa.ArrowException) as error:
            return Broken(name, first_line(error))


class Parquet(_Columns):
    """Parquet files with image bytes, perhaps as Hugging Face writes them: {bytes, path}."""

    def __init__(self, where: str, columns: Mapping[str, str], split: str) -> None:
        """Takes a file, a folder with some, or a pattern.

        Raises:
          UserError: when there is no such file, or it lacks columns.
        """
        files = find_files(where, ".parquet")
        super().__init__(files, columns, [split] * len(files))

    def _open(self, file: Path) -> tuple[pa.Schema, int]:
        with pq.ParquetFile(file) as opened:
            return opened.schema_arrow, opened.metadata.num_rows

    def _column(self, number: int, name: str) -> Iterator[pa.Scalar]:
        with pq.ParquetFile(self._files[number]) as opened:
            for batch in opened.iter_batches(columns=[name]):
                yield from batch.column(0)

    def _batches(
        self, number: int, names: list[str], first: int, end: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        with pq.ParquetFile(self._files[number], buffer_size=_BUFFER, pre_buffer=False) as opened:
            start = begin = 0
            groups: list[int] = []
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if start + rows > first and start < end:
                    begin = start if not groups else begin
                    groups.append(group)
                start += rows
            for batch in opened.iter_batches(_BATCH, row_groups=groups, columns=names):
                yield begin, batch
                begin += batch.num_rows


class HuggingFace(_Columns):
    """A folder of `Dataset.save_to_disk`, or of `DatasetDict.save_to_disk` with its splits."""

    def __init__(self, where: str, columns: Mapping[str, str], split: str) -> None:
        """Takes the folder.

        Raises:
          UserError: when it is no such folder, or lacks columns.
        """
        folder = Path(where).expanduser()
        listed = _json(folder / _DICT).get("splits") if (folder / _DICT).is_file() else None
        listed = listed if isinstance(listed, list) else []
        wrong = next((name for name in listed if not is_split(name)), None)
        if wrong is not None:
            raise UserError(f"{folder / _DICT}: {brief(wrong)} is no name of a split")
        parts = [folder / name for name in listed] or [folder]
        files, splits = [], []
        self._features: dict[str, Any] = {}
        for part in parts:
            part_files = _data_files(part)
            self._features = self._features or _json(part / _INFO).get("features") or {}
            files += part_files
            named = canonical(part.name) or part.name if listed else ""
            splits += [split or named] * len(part_files)
        super().__init__(files, columns, splits)

    def _classes(self, schema: pa.Schema) -> tuple[str, ...]:
        names = _class_names(self._features, self._chosen["label"])
        return names or super()._classes(schema)

    def _open(self, file: Path) -> tuple[pa.Schema, int]:
        # Mapped, so that the rows' number is found without reading their images.
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
            return stream.schema, sum(batch.num_rows for batch in stream)

    def _column(self, number: int, name: str) -> Iterator[pa.Scalar]:
        with pa.OSFile(str(self._files[number])) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                yield from batch.column(name)

    def _batches(
        self, number: int, names: list[str], first: int, end: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        # Not mapped into memory: pages of the whole file would count as this process's.
        with pa.OSFile(str(self._files[number])) as source, pa.ipc.open_stream(source) as stream:
            begin = 0
            for batch in stream:
                if begin + batch.num_rows > first:
                    batch.validate(full=True)
                    yield begin, batch
                begin += batch.num_rows


def _data_files(folder: Path) -> list[Path]:
    state = _json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} keeps its order in another file: call flatten_indices() before save_to_disk"
        )
    names = [each.get("filename") for each in state.get("_data_files") or ()]
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise UserError(f"{folder / _STATE} names no data files: expected what save_to_disk writes")
    return [folder / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    values = read_json(path, missing=None)
    if values is None:
        raise UserError(
            f"{path.parent} is no folder that Hugging Face's save_to_disk has written: it has no "
            f"{path.name}"
        )
    return values


def _class_names(features: Mapping[str, Any], label: tuple[str, ...]) -> tuple[str, ...]:
    feature = features.get(label[0]) if label and isinstance(features, Mapping) else None
    feature = feature.get("feature", feature) if isinstance(feature, dict) else feature
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image(folder: Path, value: Any) -> bytes:
    """The image of a cell: bytes, or Hugging Face's {bytes, path}."""
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if value is None and isinstance(path, str):
        return image_at(folder, checked_path(path))
    if isinstance(value, str):
        return image_at(folder, checked_path(value))
    if not isinstance(value, bytes):
        raise ValueError("it has no image")
    return value
