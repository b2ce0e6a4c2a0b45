"""Karpathy's splits: who is in which, and what can be wrong in the file."""

import json
import pickle

import pytest
from PIL import Image

from mlip_jax.core import schema as config_lib
from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.opening import open_evaluation, open_source, open_validation
from mlip_jax.data.sets.records import MissingSplit

SPLITS = ("train", "restval", "val", "test", "test")


def entry(number, split, *texts, **more):
    sentences = [{"raw": text, "tokens": text.split(), "sentid": 0} for text in texts]
    return {"filename": f"{number}.jpg", "split": split, "sentences": sentences, **more}


def write(folder, images=None, name="dataset_coco.json", place="{}"):
    if images is None:
        images = [entry(n, split, f"Image {n}.", "one") for n, split in enumerate(SPLITS)]
    for image in images:
        if isinstance(image, dict) and isinstance(image.get("filename"), str):
            file = folder / place.format(image["filename"])
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 3)).save(file)
    (folder / name).write_text(json.dumps({"images": images, "dataset": "coco"}))
    return f"karpathy:{folder / name}"


def test_splits(tmp_path):
    spec = write(tmp_path)
    source = pickle.loads(pickle.dumps(open_evaluation(spec)))
    assert (source.name, source.split, source.parts) == ("coco-karpathy-test", "test", ("test",))
    assert [source[i].captions for i in range(2)] == [("Image 3.", "one"), ("Image 4.", "one")]
    assert source[0].name == source.name_of(0) == str(tmp_path / "3.jpg")
    assert source[0].image and source[0].label == -1
    train = open_source(spec, "train")
    assert (train.split, train.parts) == ("train+restval", ("train", "restval"))
    assert list(train.captions()) == ["Image 0.", "one", "Image 1.", "one"]
    data = config_lib.default().data
    data.train = spec
    assert open_validation(data).name == "coco-karpathy-val"
    data.validation = spec
    assert open_validation(data).name == "coco-karpathy-val"
    for name, split, count in (
        ("train", "train", 1),
        ("restval", "restval", 1),
        ("dev", "val", 1),
        ("test", "test", 2),
        ("all", "all", 5),
    ):
        source = open_evaluation(f"{spec}#{name}")
        assert (source.split, len(source)) == (split, count)
        assert source.name == f"coco-karpathy-{split}"
    with pytest.raises(MissingSplit, match="no split 'restvla', only train, restval, val, test, "):
        open_evaluation(f"{spec}#restvla")


def test_sets_without_restval(tmp_path):
    spec = write(tmp_path, [entry(1, "train", "x")], "dataset_flickr30k.json")
    train = open_source(spec, "train")
    assert (train.name, train.split) == ("flickr30k-karpathy-train", "train")
    with pytest.raises(
        MissingSplit, match="flickr30k.json has no test split, only train; name one of"
    ):
        open_evaluation(spec)


@pytest.mark.parametrize("place", ["val2014/{}", "{}", "images/{}"])
def test_where_images_lie(tmp_path, place):
    images = [entry(1, "test", "x", filepath="val2014"), entry(2, "test", "y", filepath="val2014")]
    source = open_evaluation(write(tmp_path, images, place=place))
    assert source.name_of(1) == str(tmp_path / place.format("2.jpg")) and source[1].image


def test_images_without_captions_are_left_out(tmp_path):
    images = [entry(n, "train", text) for n, text in enumerate(("fine", "...", "(?)"))]
    spec = write(tmp_path, images)
    assert len(open_source(spec, "train")) == 3
    source = open_source(spec, "train", cleaning="clip_lite", max_skipped_share=0.7)
    assert len(source) == 1 and source[0].captions == ("fine",)
    assert "2 of 3 images have no caption (of 2, nothing is left" in source.notes[0]
    assert "dataset_coco.json: 1.jpg" in source.notes[0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"split": "test", "sentences": [{"raw": "x"}]}, 'needs "filename"'),
        (entry(3, "test", "x", filename=3), 'needs "filename"'),
        (entry(3, "test", "x", filepath=3), '"filepath" must be a text'),
        (entry(3, "tset", "x"), "unknown split 'tset': train, .*; did you mean 'test'"),
        (entry(3, None, "x"), "unknown split None"),
        (entry(3, "test"), 'needs "sentences"'),
        ({"filename": "3.jpg", "split": "test"}, 'needs "sentences"'),
        (entry(3, "test", ""), 'needs "sentences"'),
        (entry(3, "test", "x", sentences=[{"tokens": ["x"]}]), 'needs "sentences"'),
        (3, 'needs "filename"'),
    ],
)
def test_malformed_entries(tmp_path, image, message):
    spec = write(tmp_path, [entry(1, "test", "fine"), image])
    with pytest.raises(UserError, match=rf"dataset_coco.json: images\[1\]:? {message}") as caught:
        open_evaluation(spec)
    assert "\n" not in str(caught.value)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(UserError, match="cannot read .*Is a directory"):
        open_evaluation(f"karpathy:{tmp_path}")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match='a.json: expected an object with "images", a list'):
        open_evaluation(f"karpathy:{tmp_path / 'a.json'}")
