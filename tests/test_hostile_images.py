"""Damaged and forged image files: decoded rightly, or the one error of unreadable images."""

import io

import numpy as np
import pytest
from images import encoded, exif, picture
from PIL import ExifTags, Image, ImageOps

from mlip_jax.data.images import fast_decoding
from mlip_jax.data.images.limits import MOST_PIXELS, UnreadableImage
from mlip_jax.data.images.preprocessing import Preprocessing, decode, flatten
from mlip_jax.data.prepare.examine import examine

EACH = pytest.mark.parametrize(  # files made of each image
    "files_of_each", [50, pytest.param(1820, marks=pytest.mark.slow)], ids=["few", "many"]
)
EXTREMES = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)


def originals():
    """A file of every format, with EXIF data where it may have them."""
    image, turn = picture(), exif(6)
    drawing = image.convert("RGBA")
    drawing.putalpha(image.convert("L"))
    return {
        "JPEG": encoded(image, exif=turn),
        "progressive": encoded(image, progressive=True, exif=turn),
        "CMYK": encoded(image.convert("CMYK")),
        "PNG": encoded(drawing, "PNG", exif=turn),
        "palette": encoded(image.convert("P"), "PNG", transparency=3),
        "16 bits": encoded(Image.fromarray(np.asarray(image)[..., 0] * np.uint16(257)), "PNG"),
        "WebP": encoded(drawing, "WEBP", exif=turn),
        "GIF": encoded(image, "GIF", save_all=True, append_images=[image.rotate(180)]),
        "BMP": encoded(image, "BMP"),
        "TIFF": encoded(image, "TIFF", exif=turn, compression="tiff_lzw"),
        "PPM": encoded(image, "PPM"),
    }


def damaged(data, others, rng):
    """A file that is cut, forged or mixed, in one of the ways in which that happens."""
    data = bytearray(data)
    way = rng.integers(7)
    if way == 0:  # cut short
        return bytes(data[: rng.integers(len(data))])
    if way == 1:  # bits flip anywhere
        for place in rng.integers(len(data), size=rng.integers(1, 9)):
            data[place] ^= 1 << rng.integers(8)
    elif way == 2:  # the header says something else
        for place in rng.integers(min(64, len(data)), size=rng.integers(1, 4)):
            data[place] = EXTREMES[rng.integers(len(EXTREMES))]
    elif way == 3:  # a number of four bytes is the largest
        place = rng.integers(min(256, len(data)) - 4)
        data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)])
    elif way == 4:  # a part comes twice, or is gone
        start, end = sorted(rng.integers(len(data), size=2))
        data[start:end] = data[start:end] * int(rng.choice([0, 2]))
    elif way == 5:  # zeros, as after a crash
        start = rng.integers(len(data))
        data[start:] = bytes(len(data) - start)
    else:  # the beginning of one file and the end of another
        other = others[rng.integers(len(others))]
        data[rng.integers(1, min(40, len(data))) :] = other[rng.integers(1, 40) :]
    return bytes(data)


def by_pillow(data):
    """Sizes of the stored and the upright image as Pillow alone gives them; None if it refuses.

    The second is None where Pillow finds no orientation: of a damaged block of EXIF data it may
    give up the whole, or stumble over an entry when it writes it again.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception:
        return None
    size = image.size
    try:
        if ExifTags.Base.Orientation not in image.getexif():
            return size, None
        return size, ImageOps.exif_transpose(image).size
    except Exception:
        return size, None


@EACH
@pytest.mark.parametrize("name", originals())
def test_damaged_images_are_right_or_unreadable(name, files_of_each):
    files = originals()
    rng = np.random.default_rng(list(name.encode()))
    square = Preprocessing(24, transparency="white", orientation="exif")
    refused = 0
    for number in range(files_of_each):
        data = damaged(files[name], list(files.values()), rng)
        try:
            image = decode(data)
        except UnreadableImage as error:
            assert str(error) and "\n" not in str(error) and "0x" not in str(error), number
            refused += 1
            for door in (
                lambda data: decode(data, upright=True),
                fast_decoding.decode_pixels,
                square,
            ):
                with pytest.raises(UnreadableImage):
                    door(data)
            with pytest.raises(UnreadableImage):
                examine(data, 8)
            continue
        assert image.mode in ("RGB", "L", "RGBA", "LA")
        assert image.width * image.height <= MOST_PIXELS
        pixels = np.asarray(flatten(image, "white"))
        np.testing.assert_array_equal(fast_decoding.decode_pixels(data), pixels)
        turned = np.asarray(flatten(decode(data, upright=True), "white"))
        np.testing.assert_array_equal(fast_decoding.decode_pixels(data, upright=True), turned)
        stored, upright = by_pillow(data)
        size = turned.shape[1::-1]
        assert (image.size, size) == (stored, upright or size), number
        assert square(data).shape == (24, 24, 3)
        assert examine(data).data == data
    assert 0 < refused < files_of_each
