"""Tar files as they lie on the disk: plain ones are read anywhere, those in gzip forwards alone."""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"
_STEP = 2**20  # bytes that are unpacked at a time when they are passed over
# Encoded images hardly pack, and tables of text perhaps to a tenth. gzip itself can unfold a byte
# to a thousand.
_MOST_UNFOLDED = 100
_ALWAYS = 2**28  # bytes that any file may unpack to


class Container(NamedTuple):
    """An open tar file."""

    read: Callable[[int, int], bytes]  # so many bytes from an offset on; fewer at the end
    reach: Callable[[int], int]  # the offset, or where the file ends before it
    packed: bool  # `read` is slow to go back


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Container]:
    """Opens a tar file; what is in gzip is unpacked while it is read and never kept.

    Raises:
      OSError: when it cannot be read, also later by `read` and `reach`: what is packed may be cut
        short, damaged, or unfold to absurd sizes.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if os.pread(descriptor, len(_GZIP), 0) == _GZIP:
            unpacked = _Unpacked(descriptor, size)
            yield Container(unpacked.read, unpacked.reach, packed=True)
        else:
            yield Container(
                functools.partial(os.pread, descriptor), functools.partial(min, size), packed=False
            )
    finally:
        os.close(descriptor)


def is_packed(path: Path) -> bool:
    """Whether a file is in gzip; no when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_GZIP)) == _GZIP
    except OSError:
        return False


class _Unpacked:
    """What a gzip file unpacks to. What was read last can be read again at once."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._most = _ALWAYS + _MOST_UNFOLDED * size
        self._rewind()

    def _rewind(self) -> None:
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._stream = gzip.GzipFile(fileobj=os.fdopen(self._descriptor, "rb", closefd=False))
        self._start, self._buffer = 0, b""  # the bytes that were read last, and their offset

    def read(self, size: int, offset: int) -> bytes:
        """So many bytes from an offset on."""
        if self.reach(offset) < offset:
            return b""
        part = self._buffer[offset - self._start :]
        if len(part) < size:
            part += self._next(size - len(part), offset + len(part))
        self._start, self._buffer = offset, part
        return part[:size]

    def reach(self, offset: int) -> int:
        """Unpacks to an offset; returns it, or where the end is."""
        if offset < self._start:
            self._rewind()
        end = self._start + len(self._buffer)
        while end < offset:
            part = self._next(min(offset - end, _STEP), end)
            if not part:
                return end
            self._start, self._buffer = end, part
            end += len(part)
        return offset

    def _next(self, size: int, offset: int) -> bytes:
        if offset + size > self._most:
            raise OSError(
                f"it unpacks to more than {_MOST_UNFOLDED} times its size: the rest is refused"
            )
        try:
            return self._stream.read(size)
        except EOFError:
            raise OSError("what is packed is cut short") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise OSError(f"what is packed is damaged: {error}") from None
