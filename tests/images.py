"""Encoded images that tests share: with EXIF orientations, and files that ask for too much."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION = 0x0112  # of EXIF


def picture(width=48, height=32):
    """Smooth and without any symmetry."""
    colors = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    """An EXIF block as cameras write it: the maker's name stands before the orientation."""
    block = Image.Exif()
    block[0x010F] = "Maker"
    block[ORIENTATION] = orientation
    return block.tobytes()


def lying(orientation, kind="JPEG", image=None):
    """A file of an image that its EXIF data turn."""
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    return encoded(image or picture(), kind, exif=exif(orientation), **options)


def chunk(kind, content):
    """A chunk of a PNG file."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width, height, *, pixels=b"no pixels"):
    """A PNG of one bit a pixel; what is to be decoded cannot be."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", pixels),
            chunk(b"IEND", b""),
        )
    )


def jpeg_of_scans(scans, image=None):
    """A progressive JPEG whose last scan comes again and again until there are so many."""
    data = encoded(image or Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    usual = data.count(b"\xff\xda")
    return data[:end] + data[start:end] * (scans - usual) + data[end:]
