"""MNIST's files, packed or not, and what can be wrong with them."""

import gzip
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.opening import open_evaluation, open_source
from mlip_jax.data.sets.records import MissingSplit

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 4), np.uint8)
LABELS = np.array([3, 0, 9, 1, 3], np.uint8)


def encode(values, magic=None):
    magic = 0x800 + values.ndim if magic is None else magic
    sizes = b"".join(size.to_bytes(4) for size in values.shape)
    return magic.to_bytes(4) + sizes + values.tobytes()


def write(folder, prefix="t10k", pixels=PIXELS, labels=LABELS, form="{}-idx{}-ubyte.gz"):
    for kind, values in (("images", pixels), ("labels", labels)):
        content = values if isinstance(values, bytes) else encode(values)
        file = folder / f"{prefix}-{form.format(kind, 3 if kind == 'images' else 1)}"
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return f"idx:{folder}"


@pytest.mark.parametrize("form", ["{}-idx{}-ubyte.gz", "{}-idx{}-ubyte", "{}.idx{}-ubyte"])
def test_images_and_labels(tmp_path, form):
    spec = write(tmp_path, form=form)
    write(tmp_path, "train", PIXELS[:2] + 1, LABELS[:2], form)
    test, train = pickle.loads(pickle.dumps(open_evaluation(spec))), open_source(spec, "train")
    assert (test.name, test.split, test.parts) == (tmp_path.name, "validation", ("test",))
    assert [len(train), len(test)] == [2, 5] and test.class_names == tuple("0123456789")
    for index in range(5):
        record = test[index]
        with Image.open(io.BytesIO(record.image)) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.array(image), PIXELS[index])
        assert (record.label, record.captions) == (LABELS[index], (str(LABELS[index]),))
        assert (
            record.name
            == test.name_of(index)
            == (f"{tmp_path}/t10k-{form.format('images', 3)}[{index}]")
        )
    together = open_evaluation(f"{spec}#all")
    assert len(together) == 7 and together.name_of(1).endswith(f"{form.format('images', 3)}[1]")
    assert [together[index].image for index in range(2)] == [train[0].image, train[1].image]
    assert together[2] == test[0] and together[6] == test[4]
    with pytest.raises(MissingSplit, match="has no split 'val', only train, test, all"):
        open_evaluation(f"{spec}#val")


def test_class_names(tmp_path):
    spec = write(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps([f"T-shirt/top  {i}" for i in range(10)]))
    assert open_evaluation(spec)[2].captions == ("T-shirt/top 9",)
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    with pytest.raises(
        UserError, match="t10k-labels-idx1-ubyte.gz: the label 3 of image 0 is out of range: there"
    ):
        open_evaluation(spec)
    (tmp_path / "classes.json").write_text('{"a": "b"}')
    with pytest.raises(UserError, match="classes.json: expected a list of class names"):
        open_evaluation(spec)


def test_a_test_set_alone(tmp_path):
    with pytest.raises(MissingSplit, match="no train split, only test"):
        open_source(write(tmp_path), "train")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pixels": encode(PIXELS, 0x801)}, "images-.*begins with 00000801, not .* 00000803"),
        ({"labels": encode(LABELS, 0x802)}, "labels-.*begins with 00000802, not .* 00000801"),
        ({"pixels": b""}, "begins with nothing"),
        ({"pixels": encode(PIXELS)[:-1]}, "damaged: its header says 5x3x4 bytes"),
        ({"labels": encode(LABELS) + b"."}, "damaged: its header says 5 bytes"),
        ({"labels": LABELS[:4]}, "images-.*holds 5 images, but there are 4 labels"),
        ({"labels": LABELS + 1}, "the label 10 of image 2 is out of range: there are 10 classes"),
    ],
)
@pytest.mark.parametrize("form", ["{}-idx{}-ubyte.gz", "{}-idx{}-ubyte"])
def test_wrong_files(tmp_path, wrong, message, form):
    with pytest.raises(UserError, match=message) as caught:
        open_evaluation(write(tmp_path, form=form, **wrong))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="no train-images-idx3-ubyte or t10k-images-idx3-ubyte"):
        open_evaluation(f"idx:{tmp_path}")
    with pytest.raises(UserError, match="no such folder"):
        open_evaluation(f"idx:{tmp_path / 'none'}")
    spec = write(tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    intact = file.read_bytes()
    for content in (b"no gzip file at all", intact[:-9], intact[:20] + b"\xff" * 9 + intact[29:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"images-idx3-ubyte.gz: no gzip file, or a damaged"):
            open_evaluation(spec)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="lacks t10k-labels-idx1-ubyte"):
        open_evaluation(spec)
