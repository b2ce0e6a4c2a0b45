"""Rows of CSV and TSV tables, each with its place: a quotation mark takes no other row with it."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import MOST_LINE, Line, lines
from mlip_jax.data.sets.files import IMAGE_SUFFIXES

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BREAK = re.compile(rb"\r\n|\r|\n")
_BREAKS = {"\r", "\n"}
_UNCLOSED = (
    "a quotation mark opens a field that is not closed before the next row: double the marks "
    'within a field and close it, as in "5"" wide"'
)


class Row(NamedTuple):
    """A row of a table, and what is wrong with it."""

    start: int  # offset of its first line
    end: int
    line: int  # number of its first line
    fields: list[str]
    reason: str  # "": nothing


class TableFile:
    """How a table is read: its separator, the encoding, and where a row names its image.

    A field in quotation marks may hold separators and line breaks, and marks that are doubled. In a
    table with tabs a mark that does not do this is a letter like any other. In one with commas it
    makes its row a wrong one, and the rows after it are read as ever: a field reaches over no line
    that is a row itself, with an image's name in its place.
    """

    def __init__(self, path: Path, decode: Callable[[bytes], str]) -> None:
        """Takes the file, whose suffix .tsv or .tab says that it has tabs, and how it is decoded.

        `decode` may raise UnicodeDecodeError.

        Raises:
          UserError: when the file cannot be read, or is in UTF-16.
        """
        self.path = check_text(path)
        self._separator = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
        self._decode = decode
        self._columns = 0  # of each row; 0: any number
        self._image = 0  # which of them names the image
        self._has_suffixes = False  # whether images' names end in .jpg or the like

    def header(self, file: BinaryIO) -> Row:
        """The first row, which is one line; without fields where there is none."""
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        return next(self._rows(file, 1), Row(0, 0, 1, [], ""))

    def rows(self, file: BinaryIO, header: Row, image: int) -> Iterator[Row]:
        """All rows after the header; empty lines are none.

        Args:
          file: the table.
          header: the first row.
          image: which of its columns names the image.
        """
        self._columns, self._image = len(header.fields), image
        file.seek(header.end)
        yield from self._rows(file, header.line + 1)

    def fields(self, text: str) -> list[str]:
        """The fields of the text of one row.

        Raises:
          ValueError: when there is a wrong quotation mark.
        """
        try:
            return next(self._parsed(io.StringIO(text, newline="")), [])
        except csv.Error as error:
            if self._separator == "\t":
                return text.rstrip("\r\n").split("\t")
            raise ValueError(str(error)) from None

    def _rows(self, file: BinaryIO, number: int) -> Iterator[Row]:
        coming = _Lines(file)
        while (line := coming.take()) is not None:
            first = number
            number += 1
            if line.content is None:
                yield Row(line.offset, line.offset + line.length, first, [], line.refusal)
                continue
            end = line.offset + line.length
            try:
                text = self._decode(line.content)
                if '"' in text:
                    fields, more, reason = self._quoted(text, coming)
                    end, number = end + sum(each.length for each in more), number + len(more)
                else:
                    text = text.rstrip("\r\n")
                    fields, reason = text.split(self._separator) if text else [], ""
            except UnicodeDecodeError:
                fields, reason = [], "not UTF-8"
            if not reason and fields and self._columns and len(fields) != self._columns:
                many = "1 column" if len(fields) == 1 else f"{len(fields)} columns"
                reason = f"has {many}, not {self._columns}"
            if fields and not (reason or self._has_suffixes) and self._columns:
                self._has_suffixes = fields[self._image].lower().strip().endswith(IMAGE_SUFFIXES)
            if fields or reason:
                yield Row(line.offset, end, first, fields, reason)

    def _quoted(self, text: str, coming: _Lines) -> tuple[list[str], list[Line], str]:
        """The fields of a row that begins with this line, its further lines, and what is wrong."""
        with contextlib.suppress(csv.Error):
            return next(self._parsed([text])), [], ""
        more: list[Line] = []
        named = self._images_of(text)  # by the lines; of a row, one names its image
        unclosed = False

        def texts() -> Iterator[str]:
            nonlocal named, unclosed
            yield text
            unclosed, size = True, len(text)  # more is asked for
            while self._columns and (line := coming.take()) is not None:
                more.append(line)
                size += line.length
                if line.content is None or size > MOST_LINE:
                    return
                further = self._decode(line.content)
                images = self._images_of(further)
                if named and images:
                    return
                named = named or images
                yield further

        try:
            fields = next(self._parsed(texts()))
            if self._is_row(fields, named):
                return fields, more, ""
            reason = _UNCLOSED
        except (csv.Error, UnicodeDecodeError) as error:
            reason = _UNCLOSED if unclosed else str(error)
        coming.give_back(more)  # they are no part of it
        if self._separator == "\t":
            return text.rstrip("\r\n").split("\t"), [], ""
        return [], [], reason

    def _is_row(self, fields: list[str], named: set[str]) -> bool:
        """Whether fields over several lines are one row: with the image that a line names."""
        if len(fields) != self._columns:
            return False
        image = fields[self._image].strip().lower()
        return bool(image) and not _BREAKS & set(image) and (not named or image in named)

    def _images_of(self, line: str) -> set[str]:
        """The name of an image, if a line has the form of a row, whatever its quotation marks."""
        pieces = [piece.strip(' "\r\n').lower() for piece in line.split(self._separator)]
        if not self._columns or len(pieces) < self._columns:
            return set()
        # Separators in texts move the places from the left or from the right.
        places = {pieces[self._image], pieces[self._image - self._columns]}
        if images := {place for place in places if place.endswith(IMAGE_SUFFIXES)}:
            self._has_suffixes = True
            return images
        one_word = len(pieces) == self._columns and len(pieces[self._image].split()) == 1
        return places if one_word and not self._has_suffixes else set()

    def _parsed(self, texts: Iterable[str]) -> Iterator[list[str]]:
        # A text may be longer than the 131,072 characters that the module takes by itself.
        csv.field_size_limit(MOST_LINE)
        return csv.reader(texts, delimiter=self._separator, strict=True)


class _Lines:
    """The lines of a file, which may be given back. A lone "\\r" ends a line, too."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = lines(file)
        self._waiting: list[Line] = []  # the next one is the last

    def take(self) -> Line | None:
        if self._waiting:
            return self._waiting.pop()
        line = next(self._lines, None)
        if line is None or line.content is None or b"\r" not in line.content[:-2]:
            return line
        self._waiting = _physical_lines(line.offset, line.content)[::-1]
        return self._waiting.pop()

    def give_back(self, taken: Sequence[Line]) -> None:
        self._waiting += taken[::-1]


def _physical_lines(offset: int, content: bytes) -> list[Line]:
    ends = [match.end() for match in _BREAK.finditer(content)]
    ends += [len(content)] * (ends[-1] < len(content))
    return [
        Line(offset + begin, end - begin, content[begin:end])
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def check_text(path: Path) -> Path:
    """The path of a text file that can be read line by line.

    Raises:
      UserError: when it cannot.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) in _UTF16:
                raise UserError(f"{path} is in UTF-16: save it as UTF-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return path
