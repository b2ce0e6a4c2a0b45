"""Where the members of a tar file lie (POSIX.1-2001 pax, ustar and GNU headers).

Nothing is ever extracted. Python's own tarfile stops without a word at a damaged header, keeps
every member in memory and takes 20 microseconds for one, which is why this is our own.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlip_jax.data.prepare.containers import Container, opened
from mlip_jax.data.prepare.readers import Broken

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_SEARCHED = 2048 * _BLOCK  # bytes a step, when a header is damaged
_DIGITS = 20  # of a size
_MOST_NAME = 2**20  # bytes of a long name or of pax records
_PACKED = {b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_REGULAR = (b"0", b"\0", b"7")
_OF_THE_NEXT = (b"x", b"L", b"g", b"K")  # headers that say something of other members
_LONG = (b"x", b"L")  # those of them that count: pax records, a long name
_SPECIAL = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")


class Member(NamedTuple):
    """A regular file."""

    name: str
    offset: int  # of its content
    size: int


class _Header(NamedTuple):
    name: bytes
    kind: bytes
    size: int


def members(path: Path) -> Iterator[Member | Broken]:
    """The regular files in a tar file, in order, by their headers alone.

    What is no regular file, leaves the archive by its name or reaches past its end is Broken; so is
    a damaged header, after which the next good one is looked for. Folders are passed over. Of a
    file in gzip offsets are those of what it unpacks to.
    """
    try:
        with opened(path) as container:
            yield from _members(path, container)
    except OSError as error:
        yield Broken(str(path), f"cannot read the tar file to its end: {error.strerror or error}")


def _members(path: Path, container: Container) -> Iterator[Member | Broken]:
    read, reach = container.read, container.reach
    position, ended = 0, False
    extended: dict[bytes, bytes] = {}  # what pax and GNU headers say of the next member
    while block := read(_BLOCK, position):
        if block == _ZEROS:
            position, ended = position + _BLOCK, True
            continue
        header = _parse(block)
        if header is None:
            start, (position, ended) = position, _next_header(container, position + _BLOCK)
            yield Broken(f"{path} at byte {start}", _damage(block, start, position - start))
            extended = {}
            continue
        ended = False
        data = position + _BLOCK
        raw, kind, size = header
        if extended and b"size" in extended:
            size = _number(extended[b"size"]) or size
        reached = reach(data + size)
        if reached < data + size:
            name = (extended.get(b"path") or raw).decode("utf-8", "backslashreplace")
            yield Broken(
                f"{path}/{name}",
                f"its header says {size:,} bytes, but the tar file has {reached - data:,} more: it "
                "is cut short or damaged",
            )
            if container.packed:
                return
            (position, ended), extended = _next_header(container, data), {}
            continue
        position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if kind in _OF_THE_NEXT:
            if kind in _LONG and size <= _MOST_NAME:
                extended |= _long(kind, read(size, data))
            continue
        if extended:
            raw = extended.get(b"path") or raw
            kind = b"S" if any(key.startswith(b"GNU.sparse") for key in extended) else kind
            extended = {}
        name = raw.decode("utf-8", "backslashreplace")
        if kind == b"5" or (name.endswith("/") and kind in _REGULAR):
            continue
        if reason := _refusal(name, kind):
            yield Broken(f"{path}/{name}", reason)
        else:
            yield Member(name, data, size)
    if not position:
        yield Broken(str(path), "the tar file is empty")
    elif not ended:
        end = reach(position)
        yield Broken(f"{path} at byte {end}", "the tar file has no end: it may be cut short")


def _parse(block: bytes) -> _Header | None:
    """A header; None when its checksum or its size is wrong."""
    stored = _number(block[148:156])
    if len(block) < _BLOCK or stored is None:
        return None
    # The checksum is the sum of all bytes with its own field as spaces. Adler-32's lower half is 1
    # more, modulo 65,521, and takes a tenth of the time of Python's sum.
    summed = zlib.adler32(b"".join((block[:148], b" " * 8, block[156:]))) & 0xFFFF
    if summed != (stored + 1) % 65_521:
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _Header(name, block[156:157], size)


def _number(text: bytes) -> int | None:
    """Octal, decimal in pax records, or GNU's base 256; None when it is none of them."""
    if text[:1] == b"\x80":
        return int.from_bytes(text[1:], "big")
    text = text.strip(b" \0")
    try:
        return int(text, 8) if text.isdigit() else None  # int also takes a sign
    except ValueError:
        return None


def _long(kind: bytes, data: bytes) -> dict[bytes, bytes]:
    """What a GNU long name or pax records say."""
    if kind == b"L":
        return {b"path": data.partition(b"\0")[0]}
    records, start = {}, 0
    while match := _PAX_RECORD.match(data, start):
        length = int(match[1])
        if length <= match.end() - start or start + length > len(data):
            break
        value = data[match.end() : start + length - 1]
        if match[2] == b"size":
            value = b"%o" % int(value) if value.isdigit() and len(value) < _DIGITS else b""
        records[match[2]] = value
        start += length
    return records


def _next_header(container: Container, position: int) -> tuple[int, bool]:
    """Where the next good header is, or the end; whether it is the end."""
    while part := container.read(_SEARCHED, position):
        for start in range(0, len(part) - _BLOCK + 1, _BLOCK):
            if part[start + 257 : start + 262] == b"ustar":
                if _parse(part[start : start + _BLOCK]) is not None:
                    return position + start, False
        position += len(part)
    return container.reach(position), True


def _damage(block: bytes, start: int, skipped: int) -> str:
    if start == 0 and (packed := _PACKED.get(block[:2])):
        return f"the tar file is packed by {packed}: unpack it first"
    problem = "not a tar file" if start == 0 else "damaged"
    return f"the tar file is {problem}: {skipped:,} bytes are passed over"


def _refusal(name: str, kind: bytes) -> str:
    if kind not in _REGULAR:
        return f"{_SPECIAL.get(kind, 'of an unknown kind')}, not a regular file: refused"
    if name[0:1] not in ("/", "\\", "") and ".." not in name and name[1:2] != ":":
        return ""
    parts = re.split(r"[/\\]", name)
    if not parts[0] or ".." in parts or name[1:2] == ":":
        return "its path leads out of the archive: refused"
    return ""
