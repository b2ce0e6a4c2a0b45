"""COCO captions in their official layout, and what can be missing or wrong in it."""

import json
import pickle

import pytest
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.opening import open_evaluation, open_source
from mlip_jax.data.sets.records import MissingSplit


def write(folder, split="train2017", *, images=None, annotations=None, text=None):
    """An annotation file and a folder with an image for each of `images`; its spec."""
    images = [{"id": 9, "file_name": "9.jpg"}] if images is None else images
    if annotations is None:
        annotations = [{"image_id": 9, "id": 1, "caption": "A dog."}]
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for image in images:
        if isinstance(image, dict) and image.get("file_name"):
            Image.new("RGB", (8, 8)).save(folder / split / image["file_name"])
    content = {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "name": "CC", "url": ""}],
        "images": images,
        "annotations": annotations,
    }
    text = json.dumps(content) if text is None else text
    (folder / "annotations" / f"captions_{split}.json").write_text(text, encoding="utf-8")
    return f"coco:{folder}"


def test_a_record_an_image(tmp_path, monkeypatch):
    images = [{"id": number, "file_name": f"{number}.jpg", "license": 1} for number in (7, 3)]
    pairs = [(3, "A cat."), (7, " One\ndog"), (3, "a cat"), (7, "Two dogs"), (3, "A cat.")]
    annotations = [{"image_id": image, "id": 1, "caption": caption} for image, caption in pairs]
    spec = write(tmp_path / "coco", images=images, annotations=annotations)
    write(tmp_path / "coco", "val2017")
    source = open_source(spec, "train")
    assert (source.name, source.split, len(source)) == ("coco-train2017", "train", 2)
    assert source.notes == ()
    assert [source[index].captions for index in (0, 1)] == [
        ("One dog", "Two dogs"),
        ("A cat.", "a cat"),
    ]
    place = tmp_path / "coco/train2017/7.jpg"
    assert source[0].name == source.name_of(0) == str(place)
    assert source[0].image == place.read_bytes() and source[0].label == -1
    assert list(source.captions()) == ["One dog", "Two dogs", "A cat.", "a cat"]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    assert open_source(spec, "train", cleaning="clip_lite")[1].captions == ("a cat",)
    assert open_evaluation(spec)[0].captions == ("A dog.",)
    # By one word, in the cache folder.
    assert len(open_source("coco", "train", cache_dir=str(tmp_path))) == 2
    monkeypatch.setenv("MLIP_JAX_CACHE", str(tmp_path))
    assert len(open_source("coco", "validation")) == 1


def test_a_split_by_name(tmp_path):
    spec = write(tmp_path, "train2017", images=[{"id": 9, "file_name": "train.jpg"}])
    write(tmp_path, "val2017", images=[{"id": 9, "file_name": "val.jpg"}])
    for name, split, files in (
        ("val2017", "validation", ["val2017/val.jpg"]),
        ("val", "validation", ["val2017/val.jpg"]),
        ("train", "train", ["train2017/train.jpg"]),
        ("all", "all", ["train2017/train.jpg", "val2017/val.jpg"]),
    ):
        source = open_evaluation(f"{spec}#{name}")
        assert source.split == split
        assert [source[i].name for i in range(len(source))] == [str(tmp_path / f) for f in files]
    with pytest.raises(MissingSplit, match="no split 'test', only train, validation, all"):
        open_evaluation(f"{spec}#test")


def test_the_files_of_2014(tmp_path):
    spec = write(tmp_path, "train2014")
    assert open_source(spec, "train").name_of(0) == str(tmp_path / "train2014/9.jpg")
    write(tmp_path, "train2017")
    assert open_source(spec, "train").name_of(0) == str(tmp_path / "train2017/9.jpg")


def test_ids_may_be_texts(tmp_path):
    annotations = [{"image_id": "x", "caption": "A dog."}]
    spec = write(tmp_path, images=[{"id": "x", "file_name": "x.jpg"}], annotations=annotations)
    assert open_source(spec, "train")[0].captions == ("A dog.",)


def test_images_without_captions_are_left_out(tmp_path):
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(4)]
    annotations = [
        {"image_id": number, "caption": caption}
        for number, caption in enumerate(("fine", "...", "  "))
    ]
    spec = write(tmp_path, images=images, annotations=annotations)
    source = open_source(spec, "train", max_skipped_share=0.5)
    assert len(source) == 2
    assert source.notes[0].startswith("2 of 4 images have no caption and are left out: ")
    assert "captions_train2017.json: 2.jpg" in source.notes[0]
    source = open_source(spec, "train", max_skipped_share=0.75, cleaning="clip_lite")
    assert "3 of 4 images have no caption (of 1, nothing is left after" in source.notes[0]
    with pytest.raises(UserError, match="2 of 4 images .*max_skipped_share=0.01 allows"):
        open_source(spec, "train")


@pytest.mark.parametrize("present", ["", "annotations/captions_val2017.json", "val2017"])
def test_what_is_missing(tmp_path, present):
    if present:
        write(tmp_path, "val2017")
        (tmp_path / "val2017/9.jpg").unlink()
        (tmp_path / "annotations/captions_val2017.json").rename(tmp_path / "aside")
        if present == "val2017":
            (tmp_path / "annotations").rmdir()
        else:
            (tmp_path / "val2017").rmdir()
            (tmp_path / "aside").rename(tmp_path / present)
    with pytest.raises(UserError) as caught:
        open_source(f"coco:{tmp_path}", "validation")
    message = str(caught.value)
    assert "\n" not in message and f"unpack them in {tmp_path}" in message
    lacking = message.partition(":")[0]
    for name in ("annotations/captions_val2017.json", "val2017"):
        assert (str(tmp_path / name) in lacking.split(" ")) == (name != present)
    for name in ("train2017.zip", "val2017.zip", "annotations_trainval2017.zip"):
        assert name in message


FINE = {"image_id": 9, "caption": "x"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"text": '{"images": [,'}, "not JSON: Expecting value, line 1"),
        ({"text": "[]"}, 'expected an object with "images" and "annotations"'),
        ({"text": '{"images": []}'}, 'expected an object with "images" and "annotations"'),
        ({"images": [{"id": 9}]}, r'images\[0\] needs "id" and "file_name"'),
        ({"images": [{"file_name": "9.jpg"}]}, r'images\[0\] needs "id" and "file_name"'),
        ({"images": [3]}, r'images\[0\] needs "id"'),
        (
            {"images": [{"id": 9, "file_name": "9.jpg"}] * 2},
            r"images\[1\] has the id 9 of another image",
        ),
        ({"annotations": [FINE, {"image_id": 9}]}, r'annotations\[1\] needs "image_id" and "cap'),
        ({"annotations": [FINE, {"caption": "x"}]}, r'annotations\[1\] needs "image_id"'),
        ({"annotations": [FINE, {"id": 1}]}, r'annotations\[1\] needs "image_id"'),
        ({"annotations": [FINE, {**FINE, "caption": 3}]}, r'annotations\[1\] needs "image_id"'),
        (
            {"annotations": [FINE, {**FINE, "image_id": 8}]},
            r"annotations\[1\] is of the image 8, which is not among",
        ),
    ],
)
def test_malformed_files(tmp_path, content, message):
    spec = write(tmp_path, **content)
    with pytest.raises(UserError, match=f"captions_train2017.json: {message}") as caught:
        open_source(spec, "train")
    assert "\n" not in str(caught.value)


def test_annotations_that_are_no_text(tmp_path):
    spec = write(tmp_path)
    (tmp_path / "annotations/captions_train2017.json").write_bytes(b'{"images": "\xff"}')
    with pytest.raises(UserError, match="captions_train2017.json: not UTF-8"):
        open_source(spec, "train")
