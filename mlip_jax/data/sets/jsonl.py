"""JSON Lines beside images: captions, classes or both."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, Int8

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import kind_of, parse_json, read_file
from mlip_jax.core.texts import lines, shown, whole, wrong_path, wrong_text
from mlip_jax.data.sets.class_order import in_order
from mlip_jax.data.sets.csv_tables import IMAGE_KEYS
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.one_image import by_first, image_bits, merged_note
from mlip_jax.data.sets.records import Record, Skipped
from mlip_jax.data.sets.splits import STANDARD, Choice, split_of
from mlip_jax.data.sets.table_rows import check_text
from mlip_jax.data.text.captions import usable


class JsonlSource:
    """A JSON object a line: {"file": ..., "caption": ... or "captions": [...]}.

    The image is named by "file", "image" or "path", relative to the folder of the JSONL file;
    "split", "tags" ([str]) and "label" are optional, and a label does for a caption. Rows of one
    image are one record. Of each row only where its line begins and its label are kept in memory.
    """

    attribution = ""

    def __init__(
        self,
        path: Path,
        choice: Choice,
        spans: Int[np.ndarray, "rows 2"],
        ends: Int[np.ndarray, " records"],
        *,
        labels: Int[np.ndarray, " records"] | None = None,
        class_names: tuple[str, ...] = (),
        cleaning: str = "none",
        notes: tuple[str, ...] = (),
    ) -> None:
        """Takes the records' lines, one record after the other, and their labels.

        Args:
          path: of the file.
          choice: the split.
          spans: byte offset and length of each row's line.
          ends: where each record's rows end.
          labels: -1 for none; None: there are no classes.
          class_names: by label.
          cleaning: of captions and tags.
          notes: what was left out and what was merged.
        """
        self.name = whole(path.stem)
        self.split, self.parts = choice
        self.class_names = class_names
        self.notes = notes
        self._path = path
        self._spans = spans
        self._ends = ends
        self._labels = labels
        self._cleaning = cleaning

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        with self._path.open("rb") as file:
            rows = self._rows(file, index)
        path = self._path.parent / image_key(rows[0])
        label = -1 if self._labels is None else int(self._labels[index])
        return Record(read_file(path), *_texts(rows, self._cleaning), label, shown(str(path)))

    def name_of(self, index: int) -> str:
        """The image's path."""
        with self._path.open("rb") as file:
            return shown(str(self._path.parent / image_key(self._rows(file, index)[0])))

    def captions(self) -> Iterator[str]:
        """Every caption and tag of the split, by one pass over the file."""
        with self._path.open("rb") as file:
            for index in range(len(self)):
                for texts in _texts(self._rows(file, index), self._cleaning):
                    yield from filter(None, texts)

    def _rows(self, file: BinaryIO, index: int) -> list[dict[str, Any]]:
        first = int(self._ends[index - 1]) if index else 0
        return [_row(file, span) for span in self._spans[first : self._ends[index]]]


class MultiLabelJsonlSource(JsonlSource):
    """Rows with "labels", the classes that an image shows, which do for captions."""

    def __init__(
        self,
        *args: Any,
        present: Int[np.ndarray, " all_labels"],
        counts: Int[np.ndarray, " records"],
        **kwargs: Any,
    ) -> None:
        """Takes the classes of all records, one after the other, and how many each has."""
        super().__init__(*args, **kwargs)
        self._present = present
        self._counts = counts

    def targets(self) -> Int8[np.ndarray, "records classes"]:
        """1 where an image shows a class, else -1."""
        targets = np.full((len(self), len(self.class_names)), -1, np.int8)
        targets[np.repeat(np.arange(len(self)), self._counts), self._present] = 1
        return targets


def open_jsonl(path: Path, opening: Opening) -> JsonlSource:
    """Opens a JSONL file, checking every row of it. Captions and tags are cleaned.

    Rows of one image become one record, unless they name different classes. Classes are those of
    all its splits, sorted.

    Raises:
      MissingSplit: when no row is of this split.
      UserError: for a missing file, or "PATH:LINE: what is wrong" for a malformed row.
    """
    splits: dict[str, _Rows] = {}
    classes = _Classes()
    for number, place, span, row in json_rows(path):
        _check(place, row)
        rows = splits.setdefault(
            split_of(place, row.get("split")), _Rows(Skipped("rows", opening.cleaning))
        )
        row_labels = classes.of(row, place, number)
        captions = _captions(row)
        rows.skipped.mend(place, [*captions, *_labels(row), *(row.get("tags") or [])])
        # A row of several labels counts against every class, whatever the cleaning leaves of it.
        if (
            classes.multi_label
            or usable(captions, opening.cleaning)
            or usable(_labels(row), opening.cleaning)
        ):
            label = "" if classes.multi_label else str(row_labels[0])
            rows.images.append(image_bits(image_key(row), label))
            rows.spans.extend(span)
            rows.labels.extend(row_labels)
            rows.counts.append(len(row_labels))
        else:
            rows.skipped.add(place, [*captions, *_labels(row)])
    choice = STANDARD.choose(path, opening.wanted, splits)
    chosen = [splits[part] for part in choice.parts]
    skipped = Skipped("rows", opening.cleaning)
    for rows in chosen:
        skipped.merge(rows.skipped)
    images, spans, numbers, counts = (
        np.concatenate([np.array(getattr(rows, name)) for rows in chosen])
        for name in ("images", "spans", "labels", "counts")
    )
    order, ends = by_first(images)
    notes = (
        *skipped.notes(len(images), opening.max_skipped_share),
        *merged_note(len(images), len(ends)),
    )
    spans = spans.reshape(-1, 2)[order]
    names, places = classes.sorted()
    if classes.multi_label:
        sizes = np.diff(ends, prepend=0)
        record_of_row = np.empty(len(order), np.int64)
        record_of_row[order] = np.repeat(np.arange(len(ends)), sizes)
        # The classes of all rows of an image, each once.
        pairs = np.unique(np.repeat(record_of_row, counts) * len(names) + places[numbers])
        of, present = np.divmod(pairs, max(len(names), 1))
        return MultiLabelJsonlSource(
            path,
            choice,
            spans,
            ends,
            class_names=names,
            cleaning=opening.cleaning,
            notes=notes,
            present=present,
            counts=np.bincount(of, minlength=len(ends)),
        )
    firsts = order[np.concatenate([[0], ends[:-1]])] if len(ends) else order
    labels = np.append(places, -1)[numbers[firsts]] if names else None  # number -1 is the last
    return JsonlSource(
        path,
        choice,
        spans,
        ends,
        labels=labels,
        class_names=names,
        cleaning=opening.cleaning,
        notes=notes,
    )


@dataclass
class _Rows:
    """The rows of one split."""

    skipped: Skipped
    images: array[int] = field(default_factory=lambda: array("Q"))  # their keys
    spans: array[int] = field(default_factory=lambda: array("q"))  # offset, length, offset, ...
    labels: array[int] = field(default_factory=lambda: array("i"))  # of all rows
    counts: array[int] = field(default_factory=lambda: array("i"))  # labels a row


class _Classes:
    """The classes of a file's rows, numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._first: dict[str, int] = {}  # how rows name classes, and the first line that does so

    @property
    def multi_label(self) -> bool:
        """Whether rows have "labels"."""
        return "labels" in self._first

    def of(self, row: dict[str, Any], place: str, number: int) -> list[int]:
        """The numbers of a row's classes; of a dataset with one class a row, one, -1 for none.

        Raises:
          UserError: when some rows have "labels" and others do not.
        """
        how = next((key for key in ("labels", "label") if row.get(key) is not None), "")
        self._first.setdefault(how, number)
        other = next((key for key in self._first if key != how), how)
        if "labels" in (how, other) and how != other:
            tell = {"labels": '"labels"', "label": '"label"', "": "no label"}
            raise UserError(
                f"{place}: has {tell[how]}, but line {self._first[other]} has {tell[other]}: where "
                'some rows have "labels", all need them ([] for none)'
            )
        numbers = [
            self._numbers.setdefault(name, len(self._numbers))
            for name in dict.fromkeys(usable(_labels(row)))
        ]
        return numbers if self.multi_label else numbers or [-1]

    def sorted(self) -> tuple[tuple[str, ...], Int[np.ndarray, " classes"]]:
        """The names in order, and the place of each number among them."""
        names = tuple(in_order(self._numbers))
        places = np.empty(len(names), np.int32)
        places[[self._numbers[name] for name in names]] = np.arange(len(names))
        return names, places


def json_rows(path: Path) -> Iterator[tuple[int, str, tuple[int, int], dict[str, Any]]]:
    """The objects of a JSONL file that name an image, each on its line.

    Returns:
      Of each the number of its line, "PATH:LINE", the line's offset and length in bytes, and the
      object, whose "file", "image" or "path" is a path.

    Raises:
      UserError: when the file cannot be read; "PATH:LINE: what is wrong" for a malformed line.
    """
    with check_text(path).open("rb") as file:
        mark = len(codecs.BOM_UTF8) * (file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8)
        file.seek(mark)
        for number, line in enumerate(lines(file), start=1):
            place = f"{path}:{number}"
            if line.content is None:
                raise UserError(f"{place}: {line.refusal}")
            if not line.content.strip():
                continue
            row = parse_json(line.content, place)
            image = image_key(row)
            if not isinstance(image, str) or not image:
                raise UserError(f'{place}: needs "file" (or "image", "path"), the image\'s path')
            if wrong := wrong_path(image):
                raise UserError(f"{place}: the path of the image {wrong}")
            yield number, place, (line.offset, line.length), row


def _check(place: str, row: dict[str, Any]) -> None:
    if not any(key in row for key in ("caption", "captions", "label", "labels")):
        raise UserError(
            f'{place}: needs "caption" (a text) or "captions" (a list of them), or "label" or '
            '"labels"'
        )
    for key in ("captions", "tags", "labels"):
        values = row.get(key)
        values = [] if values is None else values
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise UserError(f'{place}: "{key}" must be a list of texts')
        check_texts(place, f'a text of "{key}"', values)
    for key in ("caption", "label"):
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f'{place}: "{key}" must be a text, found {kind_of(value)}')
        check_texts(place, f'"{key}"', [value])
    if row.get("label") is not None and row.get("labels") is not None:
        raise UserError(f'{place}: has both "label" and "labels"')
    if not all(text.strip() for text in _labels(row)):
        raise UserError(f"{place}: a label must not be empty")


def check_texts(place: str, what: str, texts: Iterable[str]) -> None:
    """Raises UserError, "PLACE: WHAT has too many characters", for texts that are too long."""
    for text in texts:
        if wrong := wrong_text(text):
            raise UserError(f"{place}: {what} {wrong}")


def _row(file: BinaryIO, span: np.ndarray) -> dict[str, Any]:
    start, length = (int(number) for number in span)
    file.seek(start)
    return parse_json(file.read(length), f"{file.name} at byte {start}")


def _texts(
    rows: Sequence[dict[str, Any]], cleaning: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions, or the labels where there are none, and tags of an image's rows."""
    captions = usable(chain.from_iterable(map(_captions, rows)), cleaning)
    captions = captions or usable(chain.from_iterable(map(_labels, rows)), cleaning) or ("",)
    tags = chain.from_iterable(row.get("tags") or () for row in rows)
    return captions, usable(tags, cleaning)


def _labels(row: dict[str, Any]) -> list[str]:
    single = row.get("label")
    return [single] if single is not None else row.get("labels") or []


def _captions(row: dict[str, Any]) -> list[str]:
    single = row.get("caption")
    return [*([single] if single else []), *(row.get("captions") or [])]


def image_key(row: dict[str, Any]) -> Any:
    """What a row names its image by, or None."""
    return next((row[key] for key in IMAGE_KEYS if key in row), None)


KIND = by_path(open_jsonl)
