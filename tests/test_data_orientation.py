"""Images that lie on their side, at every door; the right values are those of Pillow."""

import base64
import io
import itertools
import json
import struct

import numpy as np
import pytest
from images import encoded, exif, lying, picture
from PIL import Image, ImageOps, PngImagePlugin

from mlip_jax.core import schema
from mlip_jax.data.batches.training import evaluation_batches, train_batches
from mlip_jax.data.images import fast_decoding, orientation
from mlip_jax.data.images.preprocessing import Preprocessing, decode, decode_as_stored, flatten
from mlip_jax.data.prepare.examine import examine
from mlip_jax.data.sets.opening import open_source
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.recipes.recipes import recipe
from mlip_jax.reports.style import thumbnail
from mlip_jax.search import pictures

ALL = range(1, 9)
KINDS = ("JPEG", "PNG", "WEBP", "TIFF")
XMP = b"http://ns.adobe.com/xap/1.0/\0"
PACKET = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def upright(data):
    """An encoded image as Pillow turns it."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def with_segment(content):
    """A JPEG with a segment that applications read."""
    data = encoded(picture())
    size = (len(content) + 2).to_bytes(2, "big")
    return data[:2] + b"\xff\xe1" + size + content + data[2:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tag", ALL)
def test_images_are_turned_as_by_pillow(kind, tag):
    data = lying(tag, kind)
    expected = upright(data)
    assert expected.size == ((48, 32) if tag < 5 else (32, 48))
    turned = decode(data, upright=True)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(expected))
    assert orientation.of_image(turned) == orientation.of_file(turned) == 1
    np.testing.assert_array_equal(
        fast_decoding.decode_pixels(data, upright=True), np.asarray(expected)
    )
    squares = Preprocessing(24, orientation="exif")
    right = Preprocessing(24)(np.asarray(expected))
    for given in (data, Image.open(io.BytesIO(data)), expected, np.asarray(expected)):
        np.testing.assert_array_equal(squares(given), right)


@pytest.mark.parametrize("tag", ALL)
def test_images_are_taken_as_they_are_stored_unless_asked(tag):
    data = lying(tag)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(decode(data)), stored)
    np.testing.assert_array_equal(fast_decoding.decode_pixels(data), stored)
    for given in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(Preprocessing(24)(given), Preprocessing(24)(stored))


@pytest.mark.parametrize("tag", ALL)
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1"])
def test_images_of_every_mode_are_turned(mode, tag):
    image = picture().convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    data = encoded(image, "PNG", exif=exif(tag))
    right = flatten(decode(encoded(upright(data), "PNG")), "white")
    for turned in (
        flatten(decode(data, upright=True), "white"),
        fast_decoding.decode_pixels(data, upright=True),
    ):
        np.testing.assert_array_equal(np.asarray(turned), np.asarray(right))


def test_a_transparent_color_is_still_transparent_when_turned():
    image = picture().convert("L").point(lambda value: 0 if value < 128 else 255)
    data = encoded(image, "PNG", transparency=0, exif=exif(6))
    assert (np.asarray(flatten(decode(data, upright=True), "white")) == 255).all()


@pytest.mark.parametrize("tag", ALL)
def test_large_jpegs_are_turned_at_a_fraction_of_their_size(tag):
    data = lying(tag, image=picture(640, 480))
    expected = np.asarray(upright(data).reduce(4)).astype(float)
    for pixels in (
        np.asarray(decode(data, at_least=100, upright=True)),
        fast_decoding.decode_pixels(data, 100, upright=True),
    ):
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).mean() < 3
    wide, high = (480, 640) if tag > 4 else (640, 480)
    box = (0.1 * wide, 0.2 * high, 0.7 * wide, 0.9 * high)
    part = fast_decoding.resize(fast_decoding.decode_pixels(data, upright=True), box, 32)
    by_pillow = upright(data).resize((32, 32), Image.Resampling.BICUBIC, box=box)
    assert np.abs(part - np.asarray(by_pillow).astype(float)).max() <= 2


def test_xmp_counts_where_exif_says_nothing():
    data = with_segment(XMP + PACKET)
    right = np.asarray(upright(data))
    assert right.shape[:2] == (48, 32)
    np.testing.assert_array_equal(np.asarray(decode(data, upright=True)), right)
    np.testing.assert_array_equal(fast_decoding.decode_pixels(data, upright=True), right)
    both = encoded(picture(), exif=exif(1), xmp=PACKET)  # and EXIF's word counts
    assert decode(both, upright=True).size == upright(both).size == (48, 32)
    assert fast_decoding.decode_pixels(both, upright=True).shape[:2] == (32, 48)
    tiff = encoded(picture(), "TIFF", exif=exif(1), tiffinfo={700: PACKET})
    assert decode(tiff, upright=True).size == upright(tiff).size


def test_exif_as_the_text_of_a_png():
    text = PngImagePlugin.PngInfo()
    block = exif(6)
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    data = encoded(picture(), "PNG", pnginfo=text)
    assert decode(data, upright=True).size == upright(data).size == (32, 48)


@pytest.mark.parametrize("kind", range(18))
@pytest.mark.parametrize("letters", [4, 5])  # of the maker's name: beside the tag, or elsewhere
def test_blocks_of_every_form_say_what_they_say_to_pillow(kind, letters):
    """Of every type and number of values, in both orders of bytes, after a text."""
    for order, number in itertools.product("<>", (0, 1, 2, 3, 2**30)):
        values = struct.pack(f"{order}HH", 6, 6) if kind == 3 else struct.pack(f"{order}I", 6)
        block = b"".join(
            (
                {"<": b"Exif\0\0II*\0\x08\0\0\0\2\0", ">": b"Exif\0\0MM\0*\0\0\0\x08\0\2"}[order],
                struct.pack(f"{order}HHII", 0x010F, 2, letters, 38),
                struct.pack(f"{order}HHI", 0x0112, kind, number),
                values,
                bytes(4),
                b"Maker",
            )
        )
        image = Image.open(io.BytesIO(encoded(picture(), "PNG", exif=block)))
        image.load()
        assert orientation.of_file(image) == orientation.of_image(image), (order, number)
        assert orientation.of_jpeg(with_segment(block)) == orientation.of_file(image)


TORN = [
    exif(6)[:20],
    exif(6)[:12],
    b"Exif\0\0",
    b"Exif\0\0MM\0*",
    b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + 60 * b"\xff",
    exif(6).replace(b"MM\0*", b"XX\0*"),
    exif(0),
    exif(9),
    exif(65_535),
    exif(6).replace(b"\x01\x12\0\x03", b"\x01\x12\0\x02"),  # a text
    exif(6).replace(b"\x01\x12\0\x03\0\0\0\x01", b"\x01\x12\0\x03\xff\xff\xff\xff"),
    XMP + b'tiff:Orientation="9"',
    XMP + b"tiff:Orientation",
]


@pytest.mark.parametrize("block", TORN, ids=range(len(TORN)))
def test_broken_blocks_say_nothing(block):
    jpeg, stored = with_segment(block), np.asarray(picture())
    assert orientation.of_jpeg(jpeg) == 1
    np.testing.assert_array_equal(np.asarray(decode(jpeg, upright=True)), np.asarray(decode(jpeg)))
    np.testing.assert_array_equal(
        Preprocessing(24, orientation="exif")(Image.open(io.BytesIO(jpeg))), Preprocessing(24)(jpeg)
    )
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(picture(), kind, exif=block, **options)
        np.testing.assert_array_equal(np.asarray(decode(data, upright=True)), stored)


@pytest.mark.parametrize("keyword", ["exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"])
def test_texts_of_a_png_by_the_names_of_blocks(keyword):
    text = PngImagePlugin.PngInfo()
    text.add_itxt(keyword, "no block\nat\nall\nzz")
    data = encoded(picture(), "PNG", pnginfo=text)
    np.testing.assert_array_equal(np.asarray(decode(data, upright=True)), np.asarray(picture()))


@pytest.mark.parametrize("tag", ALL)
def test_boxes_and_maps_are_turned_with_their_image(tag):
    """A white box on black is where the box of the same shares is."""
    pixels = np.zeros((40, 80), np.uint8)
    pixels[10:20, 20:50] = 255
    turned = np.asarray(
        ImageOps.exif_transpose(
            Image.open(io.BytesIO(encoded(Image.fromarray(pixels), "PNG", exif=exif(tag))))
        )
    )
    np.testing.assert_array_equal(orientation.turned_pixels(pixels, tag), turned)
    rows, columns = np.nonzero(turned)
    high, wide = turned.shape
    expected = (
        columns.min() / wide,
        rows.min() / high,
        (columns.max() + 1) / wide,
        (rows.max() + 1) / high,
    )
    box = orientation.turned_box((20 / 80, 10 / 40, 50 / 80, 20 / 40), tag)
    assert box == pytest.approx(expected)


# Training, evaluation and preparation -------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """One class of photographs that all lie differently, and one that stands."""
    for name in ("lying", "standing"):
        (tmp_path / name).mkdir()
    for tag in ALL:
        (tmp_path / "lying" / f"{tag}.jpg").write_bytes(lying(tag, image=picture(96, 64)))
    (tmp_path / "standing" / "1.jpg").write_bytes(encoded(picture(96, 64)))
    return tmp_path


def config_of(folder, **changes):
    config = recipe("quick", f"folder:{folder}")
    config.batch_size = 9
    config.data.workers = 0
    config.data.augment.crop = (1.0, 1.0)
    config.data.augment.flip = False
    config.data.augment.color = 0.0
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    "changes", [{}, {"data.decode": "exact"}, {"data.augment.trim": 1.0}], ids=lambda c: str(c)
)
def test_training_sees_images_upright(folder, changes):
    """The same views as of files that were turned before."""

    def views(of, **more):
        config = config_of(of, **changes, **more)
        source = open_source(config.data.train, "train")
        batches = train_batches(config, source, load_tokenizer("clip"), start_step=0)
        try:
            return next(batches)["image"]
        finally:
            batches.close()

    seen, stored = views(folder), views(folder, **{"data.orientation": "ignore"})
    for file in folder.glob("*/*.jpg"):
        data = encoded(upright(file.read_bytes()), "PNG")
        file.write_bytes(data)
    right = views(folder)
    # JPEGs are decoded with less precision where they are much larger than the view.
    assert np.abs(seen.astype(int) - right).mean() < 2
    assert np.abs(stored.astype(int) - right).mean() > 10


def test_evaluation_sees_images_upright(folder):
    source = open_source(f"folder:{folder}", "train")
    preprocess = Preprocessing.of(config_of(folder))
    (batch,) = evaluation_batches(source, preprocess, len(source))
    for index, pixels in enumerate(batch.images):
        image = np.asarray(upright(source[index].image))
        np.testing.assert_array_equal(pixels, Preprocessing(preprocess.image_size)(image))


def test_prepare_turns_what_it_makes_smaller_and_keeps_what_it_does_not():
    for tag in ALL:
        data = lying(tag, image=picture(96, 64))
        assert examine(data).data == examine(data, 64).data == data
        small = examine(data, 32)
        assert (small.short_side, small.long_side, small.resized) == (32, 48, True)
        image = Image.open(io.BytesIO(small.data))
        assert not image.getexif() and "exif" not in image.info
        expected = upright(data).resize(image.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 3
        clear = examine(lying(tag, "PNG", picture(96, 64).convert("RGBA").rotate(45)), 32)
        image = Image.open(io.BytesIO(clear.data))
        assert image.format == "PNG" and not image.getexif()
        assert image.size == ((48, 32) if tag < 5 else (32, 48))


# What is kept -------------------------------------------------------------------------------------


def test_configs_and_artefacts_without_the_key_ignore_orientation():
    config = recipe("quick", "emoji")
    assert config.data.orientation == "exif"
    assert Preprocessing.of(config).orientation == "exif"
    values = json.loads(schema.to_json(config))
    del values["data"]["orientation"]
    assert Preprocessing.of(schema.from_values(values)).orientation == "ignore"
    kept = Preprocessing.of(config).to_dict()
    assert Preprocessing.from_dict(json.loads(json.dumps(kept))) == Preprocessing.of(config)
    del kept["orientation"]
    assert Preprocessing.from_dict(kept).orientation == "ignore"


# Pictures -----------------------------------------------------------------------------------------


def pixels_of(picture_bytes):
    return np.asarray(Image.open(io.BytesIO(picture_bytes)).convert("RGB")).astype(int)


@pytest.mark.parametrize("tag", ALL)
@pytest.mark.parametrize("heeded", ["exif", "ignore"])
def test_the_search_page_shows_images_upright(tag, heeded):
    data = lying(tag, image=picture(96, 64))
    right = encoded(upright(data), "PNG")
    preprocess = Preprocessing(32, orientation=heeded)
    for shown, expected in (
        (pictures.thumbnail(data), pictures.thumbnail(right)),
        (pictures.square(data, preprocess), pictures.square(right, preprocess)),
    ):
        assert np.abs(pixels_of(shown) - pixels_of(expected)).mean() < 3
    # A map of what the model sees lies over the same place.
    saliency = np.zeros((4, 4), np.float32)
    saliency[0, 1] = 1
    seen = saliency if heeded == "ignore" else orientation.turned_pixels(saliency, tag)
    turn = pictures.left_to_turn(data, preprocess)
    np.testing.assert_array_equal(
        pixels_of(pictures.heat(seen, turn=turn)),
        pixels_of(pictures.heat(orientation.turned_pixels(saliency, tag))),
    )
    over = np.asarray(Image.open(io.BytesIO(pictures.heat(seen, turn=turn))))[..., 3]
    expected = np.asarray(
        Image.open(io.BytesIO(pictures.heat(orientation.turned_pixels(saliency, tag))))
    )[..., 3]
    np.testing.assert_array_equal(over, expected)


@pytest.mark.parametrize("tag", ALL)
def test_reports_show_images_upright(tag):
    data = lying(tag, image=picture(96, 64))
    shown = base64.b64decode(thumbnail(data).partition(",")[2])
    expected = base64.b64decode(thumbnail(encoded(upright(data), "PNG")).partition(",")[2])
    assert np.abs(pixels_of(shown) - pixels_of(expected)).mean() < 3


def test_what_is_decoded_as_stored_comes_with_its_orientation():
    for tag in ALL:
        image, turn = decode_as_stored(lying(tag))
        assert (image.size, turn) == ((48, 32), tag)
