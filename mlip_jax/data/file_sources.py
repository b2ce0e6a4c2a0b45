"""Sources that are files of the user: JSONL, CSV or TSV beside images, and class folders.

Whether an image exists is found out when it is read: there may be millions.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlip_jax.config import UserError, suggestion
from mlip_jax.data.captions import usable
from mlip_jax.data.records import MissingSplit, Record, Skipped

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_SPLIT_OF = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_IMAGE_KEYS = ("file", "image", "path")


class JsonlSource:
    """A JSON object a line: {"file": ..., "caption": ... or "captions": [...]}.

    The image is named by "file", "image" or "path", relative to the folder of the JSONL file;
    "split" and "tags" ([str]) are optional. Only where each line begins is kept in memory.
    """

    attribution = ""
    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        path: Path,
        split: str,
        starts: np.ndarray,
        *,
        cleaning: str = "none",
        notes: tuple[str, ...] = (),
    ) -> None:
        """Takes `starts`, int64 [rows, 2]: byte offset and length of each row's line."""
        self.name = path.stem
        self.split = split
        self.notes = notes
        self._path = path
        self._starts = starts
        self._cleaning = cleaning

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        row = self._row(index)
        path = self._path.parent / _image_key(row)
        return Record(path.read_bytes(), *self._texts(row), -1, str(path))

    def name_of(self, index: int) -> str:
        """The image's path."""
        return str(self._path.parent / _image_key(self._row(index)))

    def captions(self) -> Iterator[str]:
        """Every caption and tag of the split, by one pass over the file."""
        with self._path.open("rb") as file:
            for span in self._starts:
                for texts in self._texts(_row(file, span)):
                    yield from texts

    def _texts(self, row: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Captions and tags."""
        captions = usable(_listed(row, "caption", "captions"), self._cleaning)
        return captions, usable(row.get("tags"), self._cleaning)

    def _row(self, index: int) -> dict[str, Any]:
        with self._path.open("rb") as file:
            return _row(file, self._starts[index])


def _row(file: BinaryIO, span: np.ndarray) -> dict[str, Any]:
    start, length = (int(number) for number in span)
    file.seek(start)
    return json.loads(file.read(length))


class FileSource:
    """Image files with captions and labels held in memory: CSV tables, class folders, COCO."""

    attribution = ""

    def __init__(
        self,
        name: str,
        split: str,
        *,
        folder: Path,
        files: list[str],
        captions: Iterable[tuple[str, ...]],
        labels: list[int] | None = None,
        class_names: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        """Takes one entry an image in `files` (relative to `folder`), `captions`, `labels`.

        Captions hold no line breaks.
        """
        self.name = name
        self.split = split
        self.class_names = class_names
        self.notes = notes
        self._folder = folder
        self._files = files
        # A text an image takes half of the memory that a tuple of texts takes.
        self._captions = ["\n".join(texts) for texts in captions]
        self._labels = labels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        path = self._folder / self._files[index]
        label = self._labels[index] if self._labels else -1
        captions = tuple(self._captions[index].split("\n"))
        return Record(path.read_bytes(), captions, (), label, str(path))

    def name_of(self, index: int) -> str:
        """The image's path."""
        return str(self._folder / self._files[index])

    def captions(self) -> Iterator[str]:
        """Every caption of the split."""
        for texts in self._captions:
            yield from texts.split("\n")


def open_jsonl(
    path: Path, split: str, max_skipped_share: float, cleaning: str = "none"
) -> JsonlSource:
    """Opens a JSONL file, checking every row of it. Captions and tags are cleaned.

    Raises:
      MissingSplit: when no row is of this split.
      UserError: for a missing file, or "PATH:LINE: what is wrong" for a malformed row.
    """
    splits = _Splits(path, split)
    spans: dict[str, list[tuple[int, int]]] = {}
    skipped: dict[str, Skipped] = {}
    offset = 0
    for number, line in enumerate(_lines(path), start=1):
        begin, offset = offset, offset + len(line)
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            begin, line = begin + 3, line[3:]
        if not line.strip():
            continue
        row = _parse(path, number, line)
        of = splits.of(row.get("split"), number)
        texts = _listed(row, "caption", "captions")
        if usable(texts, cleaning):
            spans.setdefault(of, []).append((begin, len(line)))
        else:
            skipped.setdefault(of, Skipped("rows", cleaning)).add(f"{path}:{number}", texts)
    chosen = splits.choose(spans.keys() | skipped.keys())
    rows = spans.get(chosen, [])
    notes = skipped.get(chosen, Skipped("rows", cleaning)).notes(len(rows), max_skipped_share)
    starts = np.array(rows, np.int64).reshape(-1, 2)
    return JsonlSource(path, split, starts, cleaning=cleaning, notes=notes)


def open_csv(
    path: Path, split: str, max_skipped_share: float, cleaning: str = "none"
) -> FileSource:
    """Opens a CSV table, or a tab-separated one when its suffix is .tsv or .tab.

    Columns: "file", "image" or "path"; "caption" (or "text", "title"); "split" if there are splits.
    Rows of the same image become one record with several captions, which are cleaned.

    Raises:
      MissingSplit: when no row is of this split.
      UserError: for a missing file or column, or "PATH:LINE: what is wrong" for a malformed row.
    """
    splits = _Splits(path, split)
    captions: dict[str, dict[str, list[str]]] = {}
    skipped: dict[str, Skipped] = {}
    for number, row in _table(path):
        file, caption = row["file"].strip(), usable([row["caption"]], cleaning)
        if not file:
            raise UserError(f"{path}:{number}: the image column is empty")
        of = splits.of(row.get("split"), number)
        if caption:
            captions.setdefault(of, {}).setdefault(file, []).extend(caption)
        else:
            place = f"{path}:{number}"
            skipped.setdefault(of, Skipped("rows", cleaning)).add(place, [row["caption"]])
    chosen = splits.choose(captions.keys() | skipped.keys())
    images = captions.get(chosen, {})
    rows = sum(len(texts) for texts in images.values())
    return FileSource(
        path.stem,
        split,
        folder=path.parent,
        files=list(images),
        captions=[tuple(dict.fromkeys(texts)) for texts in images.values()],
        notes=skipped.get(chosen, Skipped("rows", cleaning)).notes(rows, max_skipped_share),
    )


def open_folder(
    path: Path, split: str, max_skipped_share: float, cleaning: str = "none"
) -> FileSource:
    """Opens class folders: PATH/CLASS/*.jpg, or PATH/SPLIT/CLASS/*.jpg.

    The caption of an image is the name of its class, with spaces for underscores, cleaned.

    Raises:
      MissingSplit: when there are split folders, but not this one; or none and it is not "train".
      UserError: for a missing folder, one without classes of images, or too many images of
        classes whose names are no captions.
    """
    if not path.is_dir():
        raise UserError(f"no such folder: {path}")
    # "train" is a class too: a split is a folder that holds folders.
    by_split = {
        _SPLIT_OF[entry.name.lower()]: entry
        for entry in path.iterdir()
        if entry.name.lower() in _SPLIT_OF and _folders(entry)
    }
    splits = _Splits(path, split)
    chosen = splits.choose(by_split.keys() or {"train"})
    root = by_split.get(chosen, path)
    # Labels are the same whichever split is opened.
    roots = by_split.values() or [path]
    classes = sorted({name for folder in roots for name in _folders(folder)})
    names = tuple(" ".join(name.replace("_", " ").split()) for name in classes)
    captions = [usable([name], cleaning) for name in names]
    skipped = Skipped("images", cleaning)
    files, labels = [], []
    for label, name in enumerate(classes):
        for image in sorted((root / name).rglob("*")):
            if image.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if captions[label]:
                files.append(str(image.relative_to(root)))
                labels.append(label)
            else:
                skipped.add(str(image), [names[label]])
    notes = skipped.notes(len(files), max_skipped_share)
    if not files:
        raise UserError(f"no images in {root}: expected {root}/CLASS/*.jpg (or .png, .webp, ...)")
    return FileSource(
        path.resolve().name,
        split,
        folder=root,
        files=files,
        captions=[captions[label] for label in labels],
        labels=labels,
        class_names=names,
        notes=notes,
    )


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []


class _Splits:
    """Which rows belong to the split that was asked for."""

    def __init__(self, path: Path, wanted: str) -> None:
        self._path = path
        self._wanted = wanted

    def of(self, value: Any, line: int) -> str:
        """The split that a row names: "train" where it names none."""
        if value is None or value == "":
            return "train"
        split = _SPLIT_OF.get(value.strip().lower()) if isinstance(value, str) else None
        if split is None:
            raise UserError(
                f"{self._path}:{line}: unknown split {value!r}: train, validation or test"
                f"{suggestion(value, _SPLIT_OF)}"
            )
        return split

    def choose(self, present: set[str]) -> str:
        """The split to read; "test" stands in where nothing is for validation."""
        candidates = ("train",) if self._wanted == "train" else ("validation", "test")
        for candidate in candidates:
            if candidate in present:
                return candidate
        there = ", ".join(sorted(present)) or "no rows"
        raise MissingSplit(f"{self._path} has no {self._wanted} split, only {there}")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise UserError(f"{path}:{number}: not UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON: {error.msg}, column {error.colno}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: expected a JSON object, found {_kind(row)}")
    file = _image_key(row)
    if not isinstance(file, str) or not file:
        raise UserError(f'{path}:{number}: needs "file" (or "image", "path"), the image\'s path')
    if "caption" not in row and "captions" not in row:
        raise UserError(f'{path}:{number}: needs "caption" (a text) or "captions" (a list of them)')
    for key in ("captions", "tags"):
        values = row.get(key) or []
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise UserError(f'{path}:{number}: "{key}" must be a list of texts')
    if not isinstance(row.get("caption") or "", str):
        raise UserError(f'{path}:{number}: "caption" must be a text, found {_kind(row["caption"])}')
    return row


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}.get(
        type(value), "a number"
    )


def _image_key(row: dict[str, Any]) -> Any:
    return next((row[key] for key in _IMAGE_KEYS if key in row), None)


def _listed(row: dict[str, Any], one: str, many: str) -> list[str]:
    single = row.get(one)
    return [*([single] if single else []), *(row.get(many) or [])]


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their line numbers, the image column as "file", the text column as "caption"."""
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            columns = [column.strip().lower() for column in reader.fieldnames or ()]
            image = next((key for key in _IMAGE_KEYS if key in columns), None)
            text = next((key for key in ("caption", "text", "title") if key in columns), None)
            if image is None or text is None:
                raise UserError(
                    f"{path}:1: needs a column file (or image, path) and a column caption, "
                    f"found {', '.join(columns) or 'nothing'}"
                )
            reader.fieldnames = columns
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{reader.line_num}: not {len(columns)} columns")
                yield reader.line_num, {**row, "file": row[image], "caption": row[text]}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from None
