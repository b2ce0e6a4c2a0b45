"""Objects of images: COCO's instances_*.json, and lists of them."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.opening import open_evaluation, open_source
from mlip_jax.data.sets.records import MissingSplit

IMAGES = [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg", "license": 1}]
CATEGORIES = [{"id": 90, "name": "toothbrush", "supercategory": "indoor"}, {"id": 1, "name": "dog"}]
SOME = {"image_id": 7, "category_id": 1}
ANNOTATIONS = [
    {**SOME, "id": 1, "iscrowd": 0, "segmentation": [[1.5, 2.5, 3.5]], "bbox": [1, 2, 3, 4]},
    {**SOME, "id": 2, "iscrowd": 0, "segmentation": [[1.5, 2.5, 3.5]], "bbox": [1, 2, 3, 4]},
    {**SOME, "category_id": 90, "iscrowd": 1, "segmentation": {"counts": [1], "size": [9, 9]}},
]


def official(folder, split="val2017", *, images=IMAGES, images_folder=None, **content):
    """Writes FOLDER/annotations/instances_SPLIT.json and its images."""
    content = {
        "info": {"year": 2017, "description": "COCO"},
        "licenses": [{"id": 1, "name": "CC", "url": ""}],
        "images": images,
        "annotations": ANNOTATIONS,
        "categories": CATEGORIES,
        **content,
    }
    place = folder / (split if images_folder is None else images_folder)
    place.mkdir(parents=True, exist_ok=True)
    for image in images:
        if isinstance(image, dict) and image.get("file_name"):
            Image.new("RGB", (3, 3)).save(place / image["file_name"])
    file = folder / f"annotations/instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return f"objects:{file}"


def simple(folder, images, **more):
    (folder / "objects.json").write_text(json.dumps({"images": images, **more}))
    return f"objects:{folder / 'objects.json'}"


def test_an_official_file(tmp_path):
    spec = official(tmp_path)
    source = pickle.loads(pickle.dumps(open_evaluation(spec)))
    assert (source.name, source.split, len(source)) == ("instances_val2017", "validation", 2)
    assert source.class_names == ("toothbrush", "dog")
    assert source.targets().tolist() == [[1, 1], [-1, -1]] and source.targets().dtype == np.int8
    assert [source[i].captions for i in range(2)] == [("toothbrush", "dog"), ("",)]
    assert [source[i].label for i in range(2)] == [-1, -1] and source.notes == ()
    assert source.name_of(0) == str(tmp_path / "val2017/7.jpg")
    assert source[0].image == (tmp_path / "val2017/7.jpg").read_bytes()
    with pytest.raises(MissingSplit, match="has no train split, only validation"):
        open_source(spec, "train")


def test_a_folder_with_both_splits(tmp_path):
    official(tmp_path)
    official(tmp_path, "train2014", images=IMAGES[:1])
    official(tmp_path, "train2017", images=IMAGES[:1])
    (tmp_path / "annotations/instances_default.json").write_text("{}")
    spec = f"objects:{tmp_path}"
    train, evaluation = open_source(spec, "train"), open_evaluation(spec)
    assert (train.name, train.split, evaluation.split) == (tmp_path.name, "train", "validation")
    assert [len(train), len(evaluation)] == [1, 2]
    assert train.name_of(0) == str(tmp_path / "train2017/7.jpg")
    assert open_evaluation(f"{spec}#val2017").split == "validation"
    together = open_evaluation(f"{spec}#all")
    assert len(together) == 3 and together.targets().shape == (3, 2)
    assert all(together[index].image for index in range(3))
    with pytest.raises(MissingSplit, match="no split 'test', only train, validation, all"):
        open_evaluation(f"{spec}#test")
    official(tmp_path, "train2017", categories=CATEGORIES[::-1])
    with pytest.raises(UserError, match="has other categories than"):
        open_evaluation(f"{spec}#all")


@pytest.mark.parametrize("place", ["val2017", "annotations/val2017", "annotations/images"])
def test_where_images_lie(tmp_path, place):
    source = open_evaluation(official(tmp_path, images_folder=place))
    assert source.name_of(1) == str(tmp_path / place / "3.jpg") and source[1].image


def test_relative_paths(tmp_path, monkeypatch):
    official(tmp_path)
    monkeypatch.chdir(tmp_path / "annotations")
    assert open_evaluation("objects:instances_val2017.json")[0].image
    monkeypatch.chdir(tmp_path)
    assert open_evaluation("objects:annotations/instances_val2017.json")[0].image


def test_lists_of_objects(tmp_path):
    (tmp_path / "images").mkdir()
    rows = [
        {"id": 1, "file_name": "1.jpg", "split": "val2017", "objects": ["tie", "person"]},
        {"file_name": "2.jpg", "split": "train2017", "objects": ["person", "cat", "cat"]},
        {"file_name": "3.jpg", "split": "train2017", "objects": []},
    ]
    for row in rows:
        Image.new("RGB", (3, 3)).save(tmp_path / "images" / row["file_name"])
    licenses = [{"url": "", "id": 1, "name": "CC"}]
    spec = simple(tmp_path, rows, licenses=licenses, info={"description": "few"})
    train, evaluation = open_source(spec, "train"), open_evaluation(spec)
    assert train.class_names == evaluation.class_names == ("cat", "person", "tie")
    assert evaluation.targets().tolist() == [[-1, 1, 1]]
    assert train.targets().tolist() == [[1, 1, -1], [-1, -1, -1]]
    assert [train[i].captions for i in range(2)] == [("cat", "person"), ("",)]
    assert train.name_of(0) == str(tmp_path / "images/2.jpg") and train[0].image
    assert (train.split, evaluation.split) == ("train", "validation")
    assert open_evaluation(f"{spec}#all").targets().shape == (3, 3)
    plain = simple(tmp_path, [{**row, "split": None} for row in rows])
    assert open_evaluation(plain).split == open_source(plain, "train").split == "train"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"categories": None}, 'expected .* "images" and "annotations" and "categories", three'),
        ({"images": [{"id": 7}]}, r'images\[0\] needs "id" and "file_name"'),
        ({"images": [*IMAGES, IMAGES[0]]}, r"images\[2\] has the id 7 of another image"),
        ({"annotations": [SOME, {"id": 3}]}, r'annotations\[1\] needs "image_id" and "category'),
        (
            {"annotations": [SOME, {**SOME, "category_id": 2}]},
            r'annotations\[1\] is of the category 2, which is not among "categories"',
        ),
        (
            {"annotations": [SOME, {**SOME, "image_id": 8}]},
            r'annotations\[1\] is of the image 8, which is not among "images"',
        ),
        ({"categories": [{"id": 1}]}, r'categories\[0\] needs "id" and "name"'),
        ({"categories": CATEGORIES[:1] * 2}, r"categories\[1\] has the id 90 of another"),
    ],
)
def test_malformed_files(tmp_path, content, message):
    spec = official(tmp_path, **content)
    with pytest.raises(UserError, match=f"instances_val2017.json: {message}") as caught:
        open_evaluation(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "a.jpg"}, r'images\[1\] needs "objects", a list of class names, where'),
        ({"file_name": "a.jpg", "objects": "x"}, r'images\[1\] needs "objects"'),
        ({"file_name": "a.jpg", "objects": [""]}, r'images\[1\] needs "objects"'),
        ({"objects": []}, r'images\[1\] needs "file_name"'),
        (
            {"file_name": "a.jpg", "objects": [], "split": "tset"},
            r"images\[1\]: unknown split 'tse",
        ),
    ],
)
def test_malformed_lists(tmp_path, row, message):
    spec = simple(tmp_path, [{"file_name": "1.jpg", "objects": ["cat"]}, row])
    with pytest.raises(UserError, match=f"objects.json: {message}"):
        open_evaluation(spec)


def test_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no annotations/instances_train2017.json or .* in "):
        open_evaluation(f"objects:{tmp_path}")
    with pytest.raises(UserError, match="cannot read .*none.json: No such file"):
        open_evaluation(f"objects:{tmp_path / 'none.json'}")
    (tmp_path / "objects.json").write_text("[]")
    with pytest.raises(UserError, match='expected an object with "images", a list'):
        open_evaluation(f"objects:{tmp_path / 'objects.json'}")
