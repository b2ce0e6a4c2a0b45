"""How much an image file may ask for: it is refused by its header, before any pixel is decoded."""

from __future__ import annotations

import re

from mlip_jax.core.files import MOST_BYTES

# Pillow's own limit. Decoded, an image then has at most 341 MiB: Pillow keeps 4 bytes a pixel.
MOST_PIXELS = 89_478_485
# No JPEG is longer. Pillow's libraries keep a pointer for each row, so that an image of one column
# takes several times the memory of a square one.
MOST_SIDE = 65_535
# Encoders write about ten scans. Each passes over the whole image, even if it has no data: the
# largest image may have twice as many, smaller ones more, up to the second number.
_SCANS_OF_THE_LARGEST = 20
_MOST_SCANS = 1000

START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
_SEQUENTIAL = frozenset((0xC0, 0xC1, 0xC9))  # frames that are no progressive ones
# No marker at all, or none of a segment: 0xff may be repeated to fill up, and restarts stand alone.
_ALONE = frozenset((0x00, 0x01, *range(0xD0, 0xD9), 0xFF))
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")


class UnreadableImage(OSError):
    """A file that holds no image that can be decoded."""


def check_bytes(data: bytes) -> None:
    """Raises UnreadableImage for a file of no bytes, or of too many."""
    if not data:
        raise UnreadableImage("the image is empty")
    if len(data) > MOST_BYTES:
        raise UnreadableImage(f"the image has {len(data):,} bytes, at most {MOST_BYTES:,} are read")


def check_size(width: int, height: int) -> None:
    """Raises UnreadableImage for an image of too many pixels, in all or on a side."""
    says = f"the image's header says {width} x {height} pixels"
    if max(width, height) > MOST_SIDE:
        raise UnreadableImage(f"{says}, at most {MOST_SIDE:,} a side are decoded")
    if width * height > MOST_PIXELS:
        raise UnreadableImage(f"{says}, at most {MOST_PIXELS:,} are decoded")


def check_scans(data: bytes, width: int, height: int) -> None:
    """Raises UnreadableImage for a JPEG file of too many scans for its size."""
    components = 0
    header = jpeg_header(data)
    for marker, start, _ in header:
        if marker in _SEQUENTIAL and start + 5 < len(data):
            components = data[start + 5]
    if not header or header[-1][0] != START_OF_SCAN:
        return  # it ends before its pixels begin
    _, start, end = header[-1]
    if components and data[start : start + 1] == bytes([components]):
        return  # the first scan has all of them, and libjpeg decodes no second one
    most = min(_MOST_SCANS, _SCANS_OF_THE_LARGEST * MOST_PIXELS // max(width * height, 1))
    scans = 1 + _later_scans(data, end)
    if scans > most:
        raise UnreadableImage(
            f"the JPEG has {scans:,} scans, at most {most:,} are decoded at {width} x {height} "
            "pixels"
        )


def jpeg_header(data: bytes) -> list[tuple[int, int, int]]:
    """The segments of a JPEG file up to the head of its first scan, as far as it is undamaged.

    Returns:
      The second byte of each one's marker, and where its content starts and ends in the file.
    """
    segments = []
    place, last = 2, len(data) - 4
    while place <= last:
        marker = data[place + 1]
        if data[place] != 0xFF or marker in _ALONE:
            match = _MARKER.search(data, place)
            if match is None or match.start() > last:
                break
            place, marker = match.start(), match[1][0]
        end = place + 2 + (data[place + 2] << 8 | data[place + 3])
        segments.append((marker, place + 4, end))
        if marker in (START_OF_SCAN, _END_OF_IMAGE):
            break
        place = end if end > place + 4 else place + 4
    return segments


def _later_scans(data: bytes, place: int) -> int:
    """How many scans begin from a place on."""
    scans = 0
    while (match := _MARKER.search(data, place)) is not None and match[1][0] != _END_OF_IMAGE:
        place = match.end()
        scans += match[1][0] == START_OF_SCAN
        place += max(int.from_bytes(data[place : place + 2], "big"), 2)
    return scans
