"""What the page shows of an image, encoded anew: no byte of a file reaches the browser as it is."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from jaxtyping import Float
from PIL import Image

from mlip_jax.data.images import orientation
from mlip_jax.data.images.preprocessing import (
    Preprocessing,
    decode,
    decode_as_stored,
    flatten,
)

THUMBNAIL = 224  # pixels of the longer side
SQUARE = 512
_PINK = (0xCC, 0x79, 0xA7)  # as in the reports
_DEPTH = 0.85  # of the colour at the map's maximum


def thumbnail(content: bytes) -> bytes:
    """A small JPEG, upright, on white where the image is transparent. Raises UnreadableImage."""
    image = flatten(decode(content, at_least=THUMBNAIL, upright=True), "white")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return _encoded(image, "JPEG")


def square(content: bytes, preprocessing: Preprocessing) -> bytes:
    """The part that the model sees, upright, as a JPEG of `SQUARE` pixels.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    short = round(preprocessing.short_side * SQUARE / preprocessing.image_size)
    larger = dataclasses.replace(preprocessing, image_size=SQUARE, short_side=short)
    pixels = orientation.turned_pixels(larger(content), left_to_turn(content, preprocessing))
    return _encoded(Image.fromarray(pixels), "JPEG")


def left_to_turn(content: bytes, preprocessing: Preprocessing) -> int:
    """The orientation of what a model sees of an image, which may lie on its side.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    if preprocessing.orientation == "exif":
        return orientation.UPRIGHT
    return decode_as_stored(content, at_least=1)[1]


def heat(
    saliency: Float[np.ndarray, "rows columns"],
    seen: float = 1.0,
    turn: int = orientation.UPRIGHT,
) -> bytes:
    """A saliency map to lay on `square`, as a PNG: the pinker, the more; transparent at 0.

    Args:
      saliency: values of at least 0, as the model gives them.
      seen: the share of a side, from the first pixel, that the map covers.
      turn: as by `left_to_turn`.
    """
    share = saliency / max(float(saliency.max()), float(np.finfo(np.float32).tiny))
    side = round(seen * SQUARE)
    smooth = Image.fromarray(share.astype(np.float32)).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    alpha = np.zeros((SQUARE, SQUARE), np.uint8)
    alpha[:side, :side] = (255 * _DEPTH * np.asarray(smooth).clip(0, 1)).round()
    image = Image.new("RGB", (SQUARE, SQUARE), _PINK)
    image.putalpha(Image.fromarray(orientation.turned_pixels(alpha, turn)))
    return _encoded(image, "PNG")


def _encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return out.getvalue()
