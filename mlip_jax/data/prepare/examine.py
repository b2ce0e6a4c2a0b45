"""Every image is looked at once before it is kept: it must decode, and may be made smaller."""

from __future__ import annotations

import io
from typing import NamedTuple, cast

from PIL import Image

from mlip_jax.data.images import orientation
from mlip_jax.data.images.preprocessing import eight_bits, open_image, readable, with_alpha

JPEG_QUALITY = 92


class Examined(NamedTuple):
    """An image to keep, and what the card counts."""

    data: bytes
    format: str  # as it was found: "JPEG", ...
    mode: str  # Pillow's, as it was found: "RGB", "CMYK", "I;16", ...
    animated: bool
    resized: bool
    short_side: int  # as it is kept
    long_side: int


def examine(data: bytes, resize: int = 0) -> Examined:
    """Checks an image, and makes its shorter side `resize` pixels long where it is longer.

    What the header says is checked by the `limits` before anything is decoded. Then the image is
    decoded to its end, a JPEG at an eighth of its size (all of its data is read for that, at less
    cost). Without `resize`, and where the image is small enough, its bytes are kept as they are.
    What is made smaller (bicubic) becomes a JPEG of quality 92, or a PNG where it is transparent;
    CMYK and palettes become RGB, 16 bits 8, an animation its first frame. It is turned upright as
    its EXIF data say, which are not kept.

    Raises:
      UnreadableImage: when it is not of a known format, damaged or too large; says which.
    """
    with readable("the image cannot be decoded: "):
        image = open_image(data)
        width, height = image.size
        form, mode = image.format or "?", image.mode
        short = min(width, height)
        smaller = 0 < resize < short
        if form == "JPEG":
            side = resize if smaller else 1
            # What is not kept needs no colours; all of its data is decoded all the same.
            colours = None if smaller else "L"
            image.draft(colours, (width * side // short, height * side // short))
        image.load()
        if smaller:
            width, height = (max(1, round(edge * resize / short)) for edge in (width, height))
            pixels = with_alpha(eight_bits(image))
            resized = pixels.resize((width, height), Image.Resampling.BICUBIC)
            data = _encode(orientation.turned(resized, orientation.of_file(image)))
    sides = min(width, height), max(width, height)
    form = "JPEG" if form == "MPO" else form
    return Examined(data, form, mode, _is_animated(image), smaller, *sides)


def _is_animated(image: Image.Image) -> bool:
    """Whether there is more than the first frame; which this leaves, so that it is asked last."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # what comes after it is damaged, and is not used
        return False


def _encode(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    if image.mode in ("RGBA", "LA"):
        extrema = cast("tuple[tuple[int, int], ...]", image.getextrema())  # of each band
        if extrema[-1][0] < 255:
            image.save(stream, "PNG")
            return stream.getvalue()
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
