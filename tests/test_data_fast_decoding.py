"""Fast decoding and resizing against Pillow's."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mlip_jax.data.images import fast_decoding, limits
from mlip_jax.data.images.limits import UnreadableImage


def photo(width=320, height=240):
    """Smooth, with edges and noise, as photographs are."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    pixels = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[height // 3 :, width // 2 :] //= 2
    noisy = pixels + rng.normal(0, 4, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def psnr(actual, expected):
    return 10 * np.log10(255**2 / np.mean((actual.astype(float) - expected) ** 2))


@pytest.mark.parametrize(
    "data",
    [
        encoded(photo(), quality=90),
        encoded(photo(), quality=90, progressive=True),
        encoded(photo(), subsampling=0),
        encoded(photo().convert("L")),
        encoded(photo().convert("CMYK")),
        encoded(photo(), "PNG"),
        encoded(photo(31, 1)),
    ],
    ids=["usual", "progressive", "444", "grey", "CMYK", "PNG", "one row"],
)
def test_pixels_are_pillows(data):
    np.testing.assert_array_equal(fast_decoding.decode_pixels(data), by_pillow(data))


def test_transparency_is_laid_on_white():
    clear = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")
    assert (fast_decoding.decode_pixels(clear) == 255).all()


def test_a_large_jpeg_is_decoded_at_a_fraction():
    data = encoded(photo(400, 322))
    sides = (0, 200, 161, 100, 80, 40, 1)
    shapes = [fast_decoding.decode_pixels(data, side).shape for side in sides]
    whole, half, quarter, eighth = (322, 400, 3), (161, 200, 3), (81, 100, 3), (41, 50, 3)
    assert shapes == [whole, whole, half, half, quarter, eighth, eighth]


@pytest.mark.parametrize("at_least", [0, 100, 200])
def test_views_are_as_good_as_pillows(at_least):
    data = encoded(photo(640, 480), quality=90)
    for box in ((0, 0, 640, 480), (10.25, 20.5, 400.7, 410.1), (223.4, 0, 640, 479.99)):
        expected = Image.open(io.BytesIO(data)).resize((48, 48), Image.Resampling.BICUBIC, box)
        pixels = fast_decoding.decode_pixels(data, at_least)
        scale = pixels.shape[1] / 640
        view = fast_decoding.resize(pixels, tuple(edge * scale for edge in box), 48)
        assert psnr(view, np.asarray(expected)) > 40


def test_edges_of_crops_may_lie_anywhere():
    pixels = np.asarray(photo(7, 5))
    for seed in range(200):
        left, right = sorted(np.random.default_rng(seed).uniform(0, 7, 2))
        box = (left, 1 / 3, max(right, left + 0.1) if left < 6 else 7, 5)
        assert fast_decoding.resize(pixels, box, 8).shape == (8, 8, 3)
    pixel = np.full((1, 1, 3), 9, np.uint8)
    assert (fast_decoding.resize(pixel, (0.1, 0.2, 0.9, 1.0), 4) == 9).all()


def test_without_the_resizer_pillow_resizes(monkeypatch):
    """There are no wheels of it for Linux on ARM."""
    pixels, box = np.asarray(photo()), (30.3, 20.2, 250.7, 230.1)
    resized = fast_decoding.resize(pixels, box, 64)
    monkeypatch.setattr(fast_decoding, "resizer", None)
    plain = fast_decoding.resize(pixels, box, 64)
    expected = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC, box=box)
    assert np.abs(plain.astype(int) - np.asarray(expected)).max() <= 1
    assert psnr(resized, np.asarray(expected)) > 45


@pytest.mark.parametrize("cut", [3, 50, 2000])
def test_damaged_files_are_unreadable(cut):
    with pytest.raises(UnreadableImage):
        fast_decoding.decode_pixels(encoded(photo())[:cut])


def test_a_file_that_unfolds_to_gigabytes_is_unreadable(monkeypatch):
    monkeypatch.setattr(limits, "MOST_PIXELS", 1000)
    with pytest.raises(UnreadableImage):
        fast_decoding.decode_pixels(encoded(photo()))


def test_enlarged_crops_that_fall_on_pixels_read_no_foreign_memory():
    """cykooz.resizer 4.0.1 ends the process, or returns noise, for the first of these."""
    code = """
import numpy as np
from PIL import Image
from mlip_jax.data.images import fast_decoding

pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
for side, edge in [(8, 20.25), (8, 20.75), (12, 3.125)]:
    for left, top in [(edge, 0), (0, edge), (edge, edge)]:
        right = left + side if left else 64
        bottom = top + side if top else 64
        for _ in range(20):
            ours = fast_decoding.resize(pixels, (left, top, right, bottom), 16)
        box = (left, top, right, bottom)
        pillows = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC, box=box)
        assert (ours == np.asarray(pillows)).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_resizer_cannot_do_is_rare():
    rng = np.random.default_rng(0)
    size = 16
    risky = 0
    for _ in range(20_000):
        side = rng.uniform(8, 17)
        start = rng.uniform(0, 17 - side)
        edges = [math.floor(edge * 2**16) / 2**16 for edge in (start, start + side)]
        risky += fast_decoding._meets_a_zero(*edges, size)
    assert risky <= 20
    assert not fast_decoding._meets_a_zero(0.0, 12.0, size)  # whole images
    assert fast_decoding._meets_a_zero(20.25, 28.25, size)
