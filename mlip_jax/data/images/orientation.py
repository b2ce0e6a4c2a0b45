"""Which way up an image is: what cameras say beside the pixels, in EXIF's tag of orientation."""

from __future__ import annotations

import contextlib
import re
import struct
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image

from mlip_jax.data.images.limits import jpeg_header

UPRIGHT = 1
_Map = TypeVar("_Map", bound=np.ndarray)


class _Turn(NamedTuple):
    """What brings stored pixels upright: the steps along rows and columns, then the exchange."""

    by_pillow: Image.Transpose
    rows: int  # -1: upside down
    columns: int  # -1: mirrored
    exchanged: bool  # rows become columns


_TURNS = {
    2: _Turn(Image.Transpose.FLIP_LEFT_RIGHT, 1, -1, False),
    3: _Turn(Image.Transpose.ROTATE_180, -1, -1, False),
    4: _Turn(Image.Transpose.FLIP_TOP_BOTTOM, -1, 1, False),
    5: _Turn(Image.Transpose.TRANSPOSE, 1, 1, True),
    6: _Turn(Image.Transpose.ROTATE_270, -1, 1, True),
    7: _Turn(Image.Transpose.TRANSVERSE, -1, -1, True),
    8: _Turn(Image.Transpose.ROTATE_90, 1, -1, True),
}
# As some write it, too; the last is BigTIFF's, which Pillow reads as the others.
_ORDERS = {b"II*\0": "<", b"MM\0*": ">", b"II\0*": "<", b"MM*\0": ">", b"MM\0+": ">"}
# EXIF's types that Pillow reads: their bytes, and the whole numbers among them.
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_WHOLE_NUMBERS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I"}
_APP1 = 0xE1
_TAG = int(ExifTags.Base.Orientation)
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# Where Pillow keeps what says the orientation.
_EXIF_KEYS = ("exif", "Raw profile type exif")
_XMP_KEYS = ("XML:com.adobe.xmp", "xmp")


def of_image(image: Image.Image) -> int:
    """The orientation of an image that the user has opened by Pillow: 1 to 8, 1 being upright."""
    try:
        return _known(image.getexif().get(_TAG, UPRIGHT))
    except Exception:  # a damaged block says nothing; Pillow raises what it stumbles over
        return UPRIGHT


def of_file(image: Image.Image) -> int:
    """The orientation of an image that Pillow has decoded from a file.

    `of_image` gives the same of an undamaged block; of a damaged one Pillow may give up what is
    still there. It also reads all else in the block, which takes longer, and more memory than the
    image where the block is made for it.
    """
    if image.format == "TIFF":
        return UPRIGHT  # Pillow has turned it
    exif, profile = (image.info.get(key) for key in _EXIF_KEYS)
    if exif is None and isinstance(profile, str):
        with contextlib.suppress(ValueError):  # damaged
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
    xmp = next((image.info[key] for key in _XMP_KEYS if image.info.get(key)), b"")
    if isinstance(xmp, str):
        xmp = xmp.encode(errors="replace")
    # Any text of a PNG may be called by these names.
    return _said(exif if isinstance(exif, bytes) else b"", xmp if isinstance(xmp, bytes) else b"")


def of_jpeg(data: bytes) -> int:
    """The orientation of an encoded JPEG, without decoding it."""
    exif = xmp = b""
    for marker, start, end in jpeg_header(data):
        if marker == _APP1 and data.startswith(_EXIF, start):
            exif = exif or data[start:end]
        elif marker == _APP1 and data.startswith(_XMP, start):
            xmp = data[start + len(_XMP) : end]
    return _said(exif, xmp) if exif or xmp else UPRIGHT


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """An image brought upright, which then says nothing of its orientation any more."""
    if orientation == UPRIGHT:
        return image
    image = image.transpose(_TURNS[orientation].by_pillow)
    for key in (*_EXIF_KEYS, *_XMP_KEYS):
        image.info.pop(key, None)
    return image


def turned_pixels(pixels: _Map, orientation: int) -> _Map:
    """Pixels or a map of them, [rows, columns, ...], brought upright: a view of the same memory."""
    if orientation == UPRIGHT:
        return pixels
    _, rows, columns, exchanged = _TURNS[orientation]
    view: Any = pixels[::rows, ::columns]
    return view.swapaxes(0, 1) if exchanged else view


def turned_box(
    box: tuple[float, float, float, float], orientation: int
) -> tuple[float, float, float, float]:
    """A box, left, top, right, bottom as shares of the sides, in the image brought upright."""
    if orientation == UPRIGHT:
        return box
    left, top, right, bottom = box
    _, rows, columns, exchanged = _TURNS[orientation]
    if rows < 0:
        top, bottom = 1 - bottom, 1 - top
    if columns < 0:
        left, right = 1 - right, 1 - left
    return (top, left, bottom, right) if exchanged else (left, top, right, bottom)


def _said(exif: bytes, xmp: bytes) -> int:
    """What an EXIF block says, or if it does not, a packet of XMP."""
    value = _in_exif(exif)
    if value is None:
        match = _IN_XMP.search(xmp)
        value = int(match[1]) if match else UPRIGHT
    return _known(value)


def _known(value: Any) -> int:
    return value if isinstance(value, int) and value in _TURNS else UPRIGHT


def _in_exif(block: bytes) -> int | None:
    """The tag's value in a block; None where there is none, or the block is damaged before it."""
    while block.startswith(_EXIF):
        block = block[len(_EXIF) :]
    order = _ORDERS.get(block[:4])
    if order is None or len(block) < 8:
        return None
    (offset,) = struct.unpack_from(f"{order}4xI", block)
    count = int.from_bytes(block[offset : offset + 2], "little" if order == "<" else "big")
    entries = block[offset + 2 : offset + 2 + 12 * count]
    entries = entries[: len(entries) // 12 * 12]
    value = None
    for tag, kind, number, content in struct.iter_unpack(f"{order}HHI4s", entries):
        size = number * _BYTES.get(kind, 0)
        if tag != _TAG or not size:
            continue
        place = 0
        if size > 4:  # it stands elsewhere
            content, (place,) = block, struct.unpack(f"{order}I", content)
            if place + size > len(block):
                continue
        value = UPRIGHT
        if kind in _WHOLE_NUMBERS:
            (value,) = struct.unpack_from(order + _WHOLE_NUMBERS[kind], content, place)
    return value
