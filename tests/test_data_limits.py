"""Images that ask for too much are refused by their headers, at every door, and never decoded."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import simplejpeg
from images import encoded, jpeg_of_scans, picture, png
from PIL import Image, ImageFile
from preparing import prepare, reasons

from mlip_jax.data.batches.training import evaluation_batches, train_batches
from mlip_jax.data.images import augment, fast_decoding, limits, preprocessing
from mlip_jax.data.images.limits import UnreadableImage
from mlip_jax.data.images.preprocessing import Preprocessing, decode, flatten
from mlip_jax.data.prepare.examine import examine
from mlip_jax.data.regions.base import open_regions
from mlip_jax.data.sets.opening import open_source
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.recipes.recipes import recipe
from mlip_jax.reports.style import thumbnail
from mlip_jax.search import pictures

COLUMN = png(1, 89_000_000)
SQUARE = png(9_500, 9_500)
SCANS = jpeg_of_scans(1_001)
REASONS = {
    "column": (COLUMN, "1 x 89000000 pixels, at most 65,535 a side are decoded"),
    "row": (png(65_536, 1), "65536 x 1 pixels, at most 65,535 a side are decoded"),
    "square": (SQUARE, "more than the 89,478,485 pixels that are decoded"),
    "huge": (png(60_000, 60_000), "more than the 89,478,485 pixels that are decoded"),
    "scans": (SCANS, "the JPEG has 1,001 scans, at most 1,000 are decoded at 64 x 64 pixels"),
}


@pytest.fixture
def decoded(monkeypatch):
    """What was decoded: an entry for each call of a decoder."""
    calls = []

    def load(image):
        calls.append(image.format)
        raise OSError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: calls.append("JPEG"))
    return calls


DOORS = {
    "decode": decode,
    "at a fraction": lambda data: decode(data, at_least=8),
    "fast": fast_decoding.decode_pixels,
    "preprocessing": Preprocessing(8),
    "prepare": examine,
    "prepare --resize": lambda data: examine(data, 8),
    "report": thumbnail,
    "search": pictures.thumbnail,
    "square": lambda data: pictures.square(data, Preprocessing(8)),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", REASONS)
def test_what_costs_too_much_is_refused_before_it_is_decoded(door, name, decoded):
    data, reason = REASONS[name]
    with pytest.raises(UnreadableImage) as refusal:
        DOORS[door](data)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)
    assert not decoded


@pytest.mark.parametrize("door", DOORS)
def test_files_of_too_many_bytes(door, decoded, monkeypatch):
    monkeypatch.setattr(limits, "MOST_BYTES", 500)
    data = encoded(picture())
    with pytest.raises(UnreadableImage, match=f"has {len(data):,} bytes, at most 500 are read"):
        DOORS[door](data)
    assert not decoded


def test_paths_and_pillow_images_are_within_the_limits(tmp_path, decoded, monkeypatch):
    file = tmp_path / "scans.jpg"
    file.write_bytes(SCANS)
    with Image.open(file) as opened:
        for given in (file, opened, Image.open(io.BytesIO(SCANS))):
            with pytest.raises(UnreadableImage, match="1,001 scans"):
                Preprocessing(8)(given)
    with pytest.raises(UnreadableImage, match="at most 65,535 a side"):
        Preprocessing(8)(Image.open(io.BytesIO(COLUMN)))
    # Of a file that is too large nothing is read.
    monkeypatch.setattr(limits, "MOST_BYTES", 1_000)
    with pytest.raises(OSError, match="at most 1,000 are read"):
        Preprocessing(8)(file)
    assert not decoded


def test_usual_images_are_far_from_the_limits():
    for data in (
        encoded(picture()),
        encoded(picture(), progressive=True),
        encoded(picture(), "PNG"),
        jpeg_of_scans(1_000),
    ):
        assert examine(data).data == data and fast_decoding.decode_pixels(data).any()
    limits.check_size(65_535, 1_365)
    limits.check_size(9_459, 9_459)


def test_scans_are_counted_against_the_size():
    """Each passes over the whole image: the larger it is, the fewer are allowed."""
    twenty = jpeg_of_scans(20)
    limits.check_scans(twenty, 9_459, 9_459)
    with pytest.raises(UnreadableImage, match="21 scans, at most 20 are decoded at 9459 x 9459"):
        limits.check_scans(jpeg_of_scans(21), 9_459, 9_459)
    limits.check_scans(jpeg_of_scans(21), 9_000, 9_000)


def test_scans_of_other_images_in_a_file_are_not_counted():
    """Of an EXIF block's small image, and of what follows the end."""
    small = jpeg_of_scans(900)
    data = encoded(Image.new("L", (64, 64), 128), progressive=True)
    size = (len(small) + 2).to_bytes(2, "big")
    both = data[:2] + b"\xff\xe1" + size + small + data[2:] + small
    assert both.count(b"\xff\xda") > 1_800
    limits.check_scans(both, 64, 64)
    assert np.asarray(decode(both)).shape == (64, 64)


def test_a_plain_jpeg_has_one_scan():
    data = encoded(picture())
    start, end = data.index(b"\xff\xda"), data.rindex(b"\xff\xd9")
    again = data[:end] + data[start:end] * 2_000 + data[end:]
    limits.check_scans(again, 9_459, 9_459)
    with pytest.raises(UnreadableImage, match="broken data stream"):
        decode(again)  # libjpeg decodes no second one


@pytest.mark.parametrize("cut", range(0, 700, 3))
def test_headers_that_end_early(cut):
    data = encoded(picture(), progressive=True)[:cut]
    limits.check_scans(data, 48, 32)
    with pytest.raises(UnreadableImage):
        fast_decoding.decode_pixels(data, upright=True)


def test_large_images_are_worked_on_in_bands(monkeypatch):
    """No step makes another image as large as the whole one but its result."""
    image = picture(30, 40).convert("RGBA")
    image.putalpha(picture(30, 40).convert("L"))
    ground = Image.new("RGB", (30, 40), "white")
    ground.paste((9, 80, 200), (7, 22, 16, 37))
    whole = flatten(image, "white"), augment.trim(ground)
    monkeypatch.setattr(preprocessing, "_BAND", 100)
    sizes = []
    new = Image.new
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *a: sizes.append(size) or new(mode, size, *a)
    )
    bands = flatten(image, "white"), augment.trim(ground)
    assert sizes.count((30, 40)) == 1
    assert all(width * height <= 100 for width, height in sizes if (width, height) != (30, 40))
    for one, other in zip(whole, bands, strict=True):
        assert one.size == other.size and one.tobytes() == other.tobytes()


# Whole datasets -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A class of good images and one of those that ask for too much."""
    folder = tmp_path / "images"
    for name in ("bad", "good"):
        (folder / name).mkdir(parents=True)
    for name, (data, _) in REASONS.items():
        (folder / "bad" / f"{name}.{'jpg' if name == 'scans' else 'png'}").write_bytes(data)
    for index in range(3):
        (folder / "good" / f"{index}.jpg").write_bytes(encoded(picture(20 + index, 30)))
    return folder


def packed(folder, kind):
    """The same images in a zip file or a tar file; its path."""
    archive = folder.parent / f"images.{kind}"
    files = sorted(folder.glob("*/*"))
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for file in files:
                zipped.write(file, file.relative_to(folder))
    else:
        with tarfile.open(archive, "w") as tar:
            for file in files:
                tar.add(file, file.name)
                caption = tarfile.TarInfo(f"{file.stem}.txt")
                caption.size = 6
                tar.addfile(caption, io.BytesIO(b"a word"))
    return archive


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_they_count_as_unreadable_in_training_and_evaluation(folder, kind):
    spec = f"folder:{folder}" if kind == "folder" else f"zip:{packed(folder, 'zip')}"
    config = recipe("quick", spec)
    config.batch_size = 8
    config.data.workers = 0
    source = open_source(spec, "train")
    batches = train_batches(config, source, load_tokenizer("clip"), start_step=0)
    skipped = next(batches)["skipped"]
    batches.close()
    assert sorted(skipped) == [-1, -1, -1, 0, 1, 2, 3, 4]
    (batch,) = evaluation_batches(source, Preprocessing(8), 8)
    assert batch.readable.tolist() == [False] * 5 + [True] * 3
    for name, (_, reason) in REASONS.items():
        assert any(f"/{name}." in line and reason in line for line in batch.unreadable)


@pytest.mark.parametrize("resize", [0, 8])
def test_they_are_listed_by_prepare(folder, resize, tmp_path):
    source = f"webdataset:{packed(folder, 'tar')}"
    out = prepare(tmp_path, source, f"--resize={resize}", "--max-skipped-share=1")
    reason_of = reasons(out)
    assert len(reason_of) == 5
    for name, (_, reason) in REASONS.items():
        assert any(f"/{name}" in place and reason in why for place, why in reason_of.items())


def test_regions_on_them_cannot_be_read(folder, decoded):
    lines = [
        {"file": str(file), "caption": "a word", "box": [0, 0, 1, 1]}
        for file in sorted(folder.glob("bad/*"))
    ]
    file = folder / "regions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    regions = open_regions(file)
    for index in range(5):
        with pytest.raises(UnreadableImage):
            regions[index]
    assert not decoded
