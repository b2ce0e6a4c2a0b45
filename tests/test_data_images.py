"""Decoding, evaluation preprocessing, augmentation."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlip_jax.core import schema as config_lib
from mlip_jax.data.images.augment import augment, short_side
from mlip_jax.data.images.fast_decoding import decode_pixels
from mlip_jax.data.images.limits import UnreadableImage
from mlip_jax.data.images.preprocessing import Preprocessing, decode, flatten

DATA = Path(__file__).parent / "data"
GOLDEN = ("0_RGB", "1_RGB", "2_RGBA", "3_L")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", GOLDEN)
def test_preprocessing_equals_open_clip(name):
    preprocessing = Preprocessing(64)
    path = DATA / f"preprocess_{name}.png"
    with np.load(DATA / "preprocess_golden.npz") as golden:
        expected = golden[f"image{name}"].transpose(1, 2, 0)
    for image in (path, str(path), path.read_bytes(), Image.open(path)):
        pixels = preprocessing(image)
        assert pixels.dtype == np.uint8 and pixels.shape == (64, 64, 3)
        normalized = preprocessing.normalize(pixels)
        assert normalized.dtype == np.float32
        np.testing.assert_allclose(normalized, expected, atol=1e-5)


def test_arrays_are_images():
    pixels = np.asarray(picture(50, 40))
    expected = Preprocessing(32)(Image.fromarray(pixels))
    np.testing.assert_array_equal(Preprocessing(32)(pixels), expected)
    assert Preprocessing(32)(pixels[:, :, 0]).shape == (32, 32, 3)
    for wrong in (pixels / 255, pixels[None], pixels[:, :, :2], pixels[:0], [1, 2]):
        with pytest.raises(ValueError, match="an image must be"):
            Preprocessing(32)(wrong)


def test_preprocessing_as_json():
    preprocessing = Preprocessing(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "white")
    values = json.loads(json.dumps(preprocessing.to_dict()))
    assert Preprocessing.from_dict(values) == preprocessing


def test_transparency():
    drawing = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert Preprocessing(20)(drawing).max() == 0
    preprocessing = Preprocessing.of(config_lib.default())
    assert preprocessing(drawing).min() == 255 and preprocessing.image_size == 48
    palette = drawing.convert("P")
    palette.info["transparency"] = 0
    assert np.asarray(flatten(decode(encoded(palette)), "white")).min() == 255


def png(pixels: np.ndarray, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of samples that have so many bits, in grey or in RGB, with chunks of one's own."""
    height, width, *channels = pixels.shape
    if bits == 16:
        rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    elif bits == 8:
        rows = pixels.astype(np.uint8).reshape(height, -1)
    else:
        digits = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., -bits:]
        rows = np.packbits(digits.reshape(height, -1), axis=1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if channels else 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


def transparent_pngs() -> dict[str, tuple[bytes, np.ndarray]]:
    """PNGs with a transparent colour, and their pixels on white by the PNG standard."""
    cases = {}
    rng = np.random.default_rng(0)
    for bits in (1, 2, 4, 8, 16):
        grey = rng.integers(0, 2**bits, (24, 24))
        grey[4:20, 4:20] = color = 2**bits * 2 // 3
        # 16 bits: the shade beside it has the same upper byte, and is not transparent.
        grey[10, 10] = color + 1 if bits == 16 else color
        eight_bits = grey >> 8 if bits == 16 else grey * (255 // (2**bits - 1))
        expected = np.where(grey == color, 255, eight_bits)
        data = png(grey, bits, (b"tRNS", struct.pack(">H", color)))
        cases[f"grey, {bits} bits"] = data, np.repeat(expected[..., None], 3, axis=-1)
    for bits in (8, 16):
        pixels = rng.integers(0, 2**bits, (24, 24, 3))
        pixels[4:20, 4:20] = color = np.array((0, 2**bits // 3, 0xFF))
        expected = pixels >> bits - 8
        expected[(pixels == color).all(axis=-1)] = 255
        data = png(pixels, bits, (b"tRNS", struct.pack(">HHH", *color)))
        cases[f"RGB, {bits} bits"] = data, expected
    return cases


@pytest.mark.parametrize("name", transparent_pngs())
def test_a_transparent_color_is_laid_on_white(name):
    data, expected = transparent_pngs()[name]
    assert (expected[4:20, 4:20] == 255).all(axis=-1).mean() > 0.9  # what this test is about
    np.testing.assert_array_equal(flatten(decode(data), "white"), expected)
    np.testing.assert_array_equal(decode_pixels(data), expected)  # in training
    np.testing.assert_array_equal(Preprocessing(24, transparency="white")(data), expected)
    dropped = np.asarray(flatten(decode(data), "drop"))
    opaque = (expected < 255).any(axis=-1)
    np.testing.assert_array_equal(dropped[opaque], expected[opaque])
    assert (dropped[4:20, 4:20] < 255).any(axis=-1).all() or name == "grey, 1 bits"


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_a_transparent_color_is_what_pillow_says(mode):
    image = picture(24, 24).convert(mode)
    image.paste(0, (4, 4, 20, 20))
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    reference = Image.open(stream).convert("RGBA")
    white = Image.new("RGBA", reference.size, "white")
    expected = np.asarray(Image.alpha_composite(white, reference).convert("RGB"))
    assert (expected[4:20, 4:20] == 255).all()
    for given in (stream.getvalue(), Image.open(stream)):
        pixels = Preprocessing(24, transparency="white")(given)
        np.testing.assert_array_equal(pixels, expected)
    # Without it the image is resized as torchvision and open_clip do: in its own colours.
    if mode in ("L", "RGB"):
        small = Image.open(stream).resize((12, 12), Image.Resampling.BICUBIC).convert("RGB")
        np.testing.assert_array_equal(Preprocessing(12)(stream.getvalue()), small)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16", "RGBA"])
def test_modes(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 30), 0x8000, np.uint16))
    else:
        image = Image.new("L", (30, 30), 128).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    pixels = Preprocessing(16)(encoded(image, kind))
    if mode != "1":
        assert np.abs(pixels.astype(int) - 128).max() <= 2


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", encoded(picture(60, 60))[:200], encoded(picture(60, 60), "JPEG")[:300]],
    ids=["empty", "text", "cut png", "cut jpeg"],
)
def test_broken_files(data):
    with pytest.raises(UnreadableImage):
        decode(data)


def test_decompression_bomb(monkeypatch):
    data = encoded(picture(100, 100))
    for limit in (6000, 100):  # Pillow warns above the limit and raises above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnreadableImage, match="more than the 89,478,485 pixels"):
            decode(data)


def test_drawn_out_image():
    assert Preprocessing(32)(Image.new("RGB", (100_000, 1), "red"))[0, 0].tolist() == [255, 0, 0]


def test_jpeg_is_decoded_smaller_when_that_is_enough():
    data = encoded(picture(800, 640), "JPEG")
    assert decode(data).size == (800, 640)
    assert decode(data, at_least=100).size == (200, 160)
    assert decode(data, at_least=400).size == (800, 640)


def settings(**changes):
    chosen = config_lib.default().data.augment
    chosen.update(changes)
    return chosen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flip": True},
        {"affine": 1.0, "flip": True},
        {"color": 1.0, "grayscale": 0.5},
        {"blur": 1.0, "morphology": 1.0},
    ],
    ids=str,
)
def test_views_are_functions_of_the_generator(changes):
    chosen = settings(**changes)
    views = {}
    for size in ((96, 96), (300, 40), (20, 30)):
        image = picture(*size)
        for seed in range(4):
            pixels, flipped = augment(image, chosen, 48, np.random.default_rng(seed))
            again, flipped_again = augment(image, chosen, 48, np.random.default_rng(seed))
            assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8
            assert flipped is flipped_again and (chosen.flip or not flipped)
            np.testing.assert_array_equal(pixels, again)
            views[pixels.tobytes()] = flipped
    assert len(views) == 12
    if chosen.flip:
        assert set(views.values()) == {False, True}


@pytest.mark.parametrize("affine", [0.0, 1e-6])
def test_whole_image_unchanged(affine):
    """With the whole image as its crop, a view is the resized image, mirrored or not."""
    image = picture(96, 96)
    chosen = settings(crop=(1.0, 1.0), affine=affine, flip=True)
    expected = Preprocessing(48)(image).astype(int)
    for seed in range(8):
        pixels, flipped = augment(image, chosen, 48, np.random.default_rng(seed))
        unflipped = pixels[:, ::-1] if flipped else pixels
        # The aspect of the crop varies by a third.
        assert np.abs(unflipped - expected).mean() < 25
        assert np.abs(unflipped - expected).mean() < np.abs(unflipped[:, ::-1] - expected).mean()


def test_affine_paints_what_the_corners_show():
    image = Image.new("RGB", (64, 64), (10, 200, 30))
    pixels, _ = augment(image, settings(affine=1.0), 32, np.random.default_rng(0))
    assert np.abs(pixels - np.array((10, 200, 30))).max() <= 1


def test_grayscale_and_white_stay_themselves():
    gray, _ = augment(picture(64, 64), settings(grayscale=1.0), 32, np.random.default_rng(0))
    assert np.ptp(gray.astype(int), axis=2).max() <= 1
    for seed in range(10):
        white = Image.new("RGB", (64, 64), "white")
        pixels, _ = augment(white, settings(color=1.0), 32, np.random.default_rng(seed))
        assert np.ptp(pixels.astype(int), axis=2).max() <= 2  # no hue comes into grey


def test_short_side_fills_every_view_twice():
    assert short_side(settings(crop=(0.25, 1.0)), 48) == 192
    assert short_side(settings(), 224) > 480


def test_trim_cuts_margins_to_a_square():
    drawing = Image.new("RGB", (60, 40), "white")
    drawing.paste("navy", (20, 10, 32, 18))  # 12 x 8: trimmed to a square of 12
    view, _ = augment(drawing, settings(trim=1.0, crop=(1.0, 1.0)), 12, np.random.default_rng(0))
    dark = (view.max(-1) < 160).mean()
    assert 0.5 < dark < 0.8, dark
    blank = Image.new("RGB", (30, 30), "white")
    view, _ = augment(blank, settings(trim=1.0), 12, np.random.default_rng(0))
    assert (view > 250).all()


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("no pixels")
    with pytest.raises(UnreadableImage, match=f"{path}: not an image of a known format"):
        Preprocessing(8)(path)


@pytest.mark.parametrize("pixels", [np.float32([[0.0, 1.0]]), np.int32([[0, 70_000]])])
def test_pixels_of_no_known_range_are_refused(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "TIFF")  # Pillow would make them black, or white
    with pytest.raises(UnreadableImage, match="32 bits, of which is not known what is white"):
        decode(stream.getvalue())
