"""Photographs to small squares of pixels, in a third of Pillow's time and at the same quality.

simplejpeg hands JPEGs to libjpeg-turbo, as Pillow does, without Pillow's copies; cykooz.resizer
resizes by the vector instructions of the processor. What these cannot do is left to Pillow.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from mlip_jax.data.images import limits, orientation
from mlip_jax.data.images.preprocessing import decode, flatten

try:
    import cykooz_resizer as resizer
except ImportError:  # there are no wheels for Linux on ARM
    resizer = None

_REDUCTIONS = (8, 4, 2)  # by which libjpeg-turbo decodes without a loss of time
_GRID = 2**16  # edges of a crop are whole in these units of a pixel: their sums have no error
_SUPPORT = 2  # pixels of the coarser grid that the bicubic kernel reaches on either side
_SAME_PLACE = 1e-9  # of a pixel: closer than neighbours on the grid of edges, wider than rounding
_of_thread = threading.local()


def decode_pixels(
    data: bytes, at_least: int = 0, *, upright: bool = False
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an encoded image of any format to RGB; transparency is laid on white.

    Args:
      data: the bytes of a file, as `images.decode` takes them.
      at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its
        short side keeps this many pixels, and two thirds of that are enough to transform it with
        less precision and to spread colour, of which JPEGs have less, over the pixels plainly; 0:
        nothing of this, Pillow's pixels.
      upright: as `images.decode` takes it.

    Returns:
      RGB, in memory that the next call of this thread may write over: copy what is to be kept.

    Raises:
      UnreadableImage: when Pillow cannot decode it, or it is beyond one of the `limits`.
    """
    pixels = _jpeg(data, at_least) if data.startswith(b"\xff\xd8\xff") else None
    if pixels is None:
        image = decode(data, at_least=at_least, upright=upright)
        return np.asarray(flatten(image, "white"))
    return orientation.turned_pixels(pixels, orientation.of_jpeg(data)) if upright else pixels


def _jpeg(data: bytes, at_least: int) -> UInt8[np.ndarray, "height width 3"] | None:
    """RGB, or None where there is anything out of the ordinary, for Pillow to judge."""
    limits.check_bytes(data)
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
        if color not in ("YCbCr", "RGB", "Gray"):
            return None
        limits.check_size(width, height)
        limits.check_scans(data, width, height)
        short = min(height, width)
        reduction = next((by for by in _REDUCTIONS if 0 < at_least * by <= short), 1)
        hasty = 0 < 2 * at_least <= 3 * short
        rows, columns = -(-height // reduction), -(-width // reduction)
        need = rows * columns * 3
        # Fresh memory for every image would be asked of the system, and zeroed, each time.
        if len(getattr(_of_thread, "canvas", b"")) < need:
            _of_thread.canvas = bytearray(need)
        return simplejpeg.decode_jpeg(
            data,
            buffer=_of_thread.canvas,
            fastdct=hasty,
            fastupsample=hasty,
            min_height=-(-height // reduction),
            min_width=-(-width // reduction),
            min_factor=reduction,
        )
    except ValueError:  # damaged, or only odd
        return None


def resize(
    pixels: UInt8[np.ndarray, "height width 3"],
    box: tuple[float, float, float, float],
    size: int,
) -> UInt8[np.ndarray, "size size 3"]:
    """A part of an image, resized to a square: bicubic, averaging where it shrinks, as Pillow does.

    Args:
      pixels: RGB.
      box: left, top, right and bottom of the part, within the image; fractions count.
      size: the side of the result.
    """
    left, top, right, bottom = (math.floor(edge * _GRID) / _GRID for edge in box)
    # Only the rows that count are copied.
    reach = _SUPPORT * max(1.0, (bottom - top) / size) + 1
    first, last = max(0, int(top - reach)), min(len(pixels), math.ceil(bottom + reach))
    rows = pixels[first:last]
    risky = _meets_a_zero(left, right, size) or _meets_a_zero(top, bottom, size)
    if resizer is None or risky:
        part = (left, top - first, right, bottom - first)
        small = Image.fromarray(rows).resize((size, size), Image.Resampling.BICUBIC, box=part)
        return np.asarray(small)
    kind = resizer.PixelType.U8x3
    source = resizer.ImageData(rows.shape[1], len(rows), kind, rows.tobytes())
    small = resizer.ImageData(size, size, kind)
    part = resizer.CropBox(left, top - first, right - left, bottom - top)
    options = resizer.ResizeOptions(_bicubic(), use_alpha=False, crop_box=part)
    _resizer().resize(source, small, options)
    return np.frombuffer(small.get_buffer(), np.uint8).reshape(size, size, 3)


def _meets_a_zero(start: float, end: float, size: int) -> bool:
    """Whether the resizer (4.0.1) would read memory that is not its own for this side of a crop.

    Where it enlarges and the first or last pixel of the result lies on a pixel of the source, the
    kernel is zero at the neighbours. It drops those, and takes it that no other pixel of the result
    needs them: it then counts the rows or columns that it keeps between its two passes wrongly.
    """
    scale = (end - start) / size
    outermost = (start + scale / 2 - 0.5, end - scale / 2 - 0.5)
    return scale < 1 and any(abs(at - round(at)) < _SAME_PLACE for at in outermost)


def _bicubic() -> Any:
    """Pillow's kernel: Keys's with a = -1/2, which is Catmull and Rom's spline."""
    return resizer.ResizeAlg.convolution(resizer.FilterType.catmull_rom)


def _resizer() -> Any:
    """One for each thread: it works in buffers of its own."""
    if not hasattr(_of_thread, "resizer"):
        _of_thread.resizer = resizer.Resizer()
    return _of_thread.resizer
