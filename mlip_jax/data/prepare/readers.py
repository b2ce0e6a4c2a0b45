"""What every kind of input offers to the preparation, and what all of them read alike."""

from __future__ import annotations

import codecs
import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from mlip_jax.core.files import decode_json, kind_of, open_file, read_file
from mlip_jax.core.texts import shown, whole, wrong_path, wrong_text
from mlip_jax.data.sets.shards import Example
from mlip_jax.data.sets.splits import canonical

MOST_TEXT = 16 * 2**20  # bytes of a text or a JSON object
_GLANCE = 64  # bytes
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True)
class Broken:
    """A record that is left out."""

    name: str  # its place in the input
    reason: str


class InputRecord(NamedTuple):
    """A record as the input has it; its image is not looked at yet."""

    example: Example
    latin: int = 0  # texts that were not UTF-8
    multi_label: bool = False  # whether it has a list of labels
    place: str = ""  # in the input, where the name does not tell


class Reader(ABC):
    """An input.

    `refs` is run in the main process and says where each record lies; `read` is run in the worker
    processes, to which the reader is pickled before `refs` is called.
    """

    class_names: tuple[str, ...] = ()  # where records name classes by number; (): as they do
    multi_label = False  # whether every record has any number of labels
    attribution = ""
    repeats = False  # whether an image may be that of several records, each with a caption
    left_out = 0  # records that were read and are no records of this input, which chooses

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The files to which refs refer, as far as they are known."""

    def shown(self, file: Path) -> str:
        """One of these files as the user knows it."""
        return str(file)

    @abstractmethod
    def total(self) -> int | None:
        """How many records there are, or an estimate that gets better while `refs` is run."""

    @abstractmethod
    def refs(self) -> Iterator[tuple[str, Any]]:
        """The split of each record and where it lies, or a Broken. Always the same, in order."""

    @abstractmethod
    def read(self, refs: Sequence[Any]) -> Iterator[InputRecord | Broken]:
        """The records that lie there; a Broken is handed through."""

    def glances(self, refs: Sequence[Any]) -> Iterator[bytes]:
        """A few bytes of each image, b"" for none; images that differ in them are not equal.

        Unless an input can do with less, its images are read.
        """
        for record in self.read(refs):
            yield b"" if isinstance(record, Broken) else glance_at(record.example.image)

    def notes(self) -> Iterable[str]:
        """What to report about the input when `refs` is exhausted."""
        return ()


def glance_at(image: bytes) -> bytes:
    """A few bytes that tell most images apart."""
    return blake2b(image, digest_size=16).digest()


def glance_at_part(read: Callable[[int, int], bytes], start: int, size: int) -> bytes:
    """The size of an image, and a few bytes of its middle, where images differ.

    Args:
      read: gives so many bytes from an offset on.
      start: offset of the image.
      size: of the image, in bytes.
    """
    return b"%d " % size + read(_GLANCE, start + size // 2)


def glance_at_file(path: Path) -> bytes:
    """`glance_at_part` of a file; b"" when it cannot be read."""
    try:
        descriptor = open_file(path)
    except OSError:
        return b""
    try:
        read = functools.partial(os.pread, descriptor)
        return glance_at_part(read, 0, os.fstat(descriptor).st_size)
    except OSError:  # of a folder
        return b""
    finally:
        os.close(descriptor)


# WHERE of KIND:WHERE, the roles of columns, and the split that all of it is, "" for what the input
# says -> the input. Raises UserError for one that cannot be read.
MakeReader = Callable[[str, Mapping[str, str], str], Reader]


def split_of_file(path: Path) -> str:
    """The split that a file is called by, as in cc3m-train-00001.tar or val/1.tar; else "train"."""
    words = (*re.split(r"[-_.]", path.name), path.parent.name)
    return next(filter(None, map(canonical, words)), "train")


def decode_text(data: bytes) -> tuple[str, bool]:
    """A text, and whether it was not in UTF-8.

    UTF-16 is told by its mark. Anything else is read as Windows-1252, of which Latin-1's letters
    are a part, and where that has no character, as Latin-1: any bytes are a text then.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace"), True
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding), encoding == "cp1252"
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), True


def parse_object(data: bytes) -> tuple[dict[str, Any], bool]:
    """A JSON object, and whether it was not in UTF-8.

    Raises:
      ValueError: when it is none, or has a key twice.
    """
    text, latin = decode_text(data)
    return decode_json(text, one_line=True), latin


def texts_of(value: Any, role: str) -> tuple[str, ...]:
    """A text, or a list of them, as a tuple; () for none.

    Raises:
      ValueError: when it is anything else.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    values = [each for each in values if each is not None]
    for each in values:
        if not isinstance(each, str):
            raise ValueError(f"the {role} must be a text, found {kind_of(each)}")
        if wrong := wrong_text(each):
            raise ValueError(f"the {role} {wrong}")
    return tuple(whole(each) for each in values if each.strip())


def keys_of(value: Any) -> tuple[str, ...]:
    """A class, or a list of them, by number or by name; () for none, also for the number -1.

    Raises:
      ValueError: when it is anything else.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    keys: list[str] = []
    for each in values:
        is_number = isinstance(each, int) and not isinstance(each, bool)
        if each is None or (is_number and each < 0):
            continue
        keys += [str(each)] if is_number else texts_of(each, "label")
    return tuple(dict.fromkeys(key.strip() for key in keys))


def checked_path(path: str) -> str:
    """The path of an image, without spaces around it.

    Raises:
      ValueError: when it cannot be one.
    """
    path = path.strip()
    if not path:
        raise ValueError("the path of the image is empty")
    if wrong := wrong_path(path):
        raise ValueError(f"the path of the image {wrong}")
    return path


def image_at(folder: Path, file: str) -> bytes:
    """The image file that a table names.

    Raises:
      OSError: when it cannot be read.
    """
    if _URL.match(file):
        raise OSError("it is an address, and nothing is downloaded: fetch images with img2dataset")
    try:
        return read_file(folder / file)
    except OSError as error:
        reason = error.strerror.lower() if error.strerror else str(error)
        raise OSError(f"cannot read the image {shown(file)}: {reason}") from None
