"""PASCAL VOC's layout, and what can be missing or wrong in it."""

import pickle

import numpy as np
import pytest
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.opening import open_evaluation, open_source, split_spec
from mlip_jax.data.sets.records import MissingSplit

LISTS = {
    "cat_train.txt": "000005 -1\n",
    "dog_train.txt": "000005  1\n",
    "cat_val.txt": "000007  1\n",
    "dog_val.txt": "000007  0\n",
    "cat_trainval.txt": "000005 -1\n000007  1\n",
    "dog_trainval.txt": "000005  1\n000007  0\n\n",
    "cat_test.txt": "000001 -1\n000002  1\n000003 -1\n",
    "dog_test.txt": "000001  1\n000002  1\n000003  0\n",
    "trainval.txt": "000005\n000007\n",
}


def write(folder, **lists):
    main = folder / "ImageSets/Main"
    main.mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    for image in (1, 2, 3, 5, 7):
        Image.new("RGB", (3, 3)).save(folder / f"JPEGImages/{image:06}.jpg")
    for name, text in {**LISTS, **lists}.items():
        if text is not None:
            (main / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"voc:{folder}"


def test_targets_and_captions(tmp_path):
    spec = write(tmp_path / "VOCdevkit/VOC2007", **{"._cat_test.txt": b"attributes of macOS"})
    for place in (spec, f"voc:{tmp_path / 'VOCdevkit'}"):
        source = pickle.loads(pickle.dumps(open_evaluation(place)))
        assert (source.name, source.split, source.parts) == ("VOC2007", "test", ("test",))
        assert source.class_names == ("cat", "dog") and len(source) == 3
        assert source.targets().tolist() == [[-1, 1], [1, 1], [-1, 0]]
        assert source.targets().dtype == np.int8
        assert [source[i].captions for i in range(3)] == [("dog",), ("cat", "dog"), ("",)]
        assert [source[i].label for i in range(3)] == [-1] * 3
        assert list(source.captions()) == ["dog", "cat", "dog"]
        path = tmp_path / "VOCdevkit/VOC2007/JPEGImages/000002.jpg"
        assert source[1].name == source.name_of(1) == str(path)
        assert source[1].image == path.read_bytes()
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/000001.jpg").unlink()
    with pytest.raises(OSError):
        source[0]
    assert source.targets().shape == (3, 2)


def test_splits(tmp_path):
    spec = write(tmp_path)
    train = open_source(spec, "train")
    assert (train.split, train.parts, len(train)) == ("trainval", ("train", "val"), 2)
    assert train.targets().tolist() == [[-1, 1], [1, 0]]
    for name, split, count in (
        ("train", "train", 1),
        ("validation", "val", 1),
        ("trainval", "trainval", 2),
        ("test", "test", 3),
        ("all", "all", 5),
    ):
        source = open_evaluation(f"{spec}#{name}")
        assert (source.split, len(source)) == (split, count) == (split, len(source.targets()))
    with pytest.raises(MissingSplit, match="no split 'tranval', only .*did you mean 'trainval'"):
        open_evaluation(f"{spec}#tranval")
    with pytest.raises(MissingSplit, match="has no validation split, only train, val, trainval"):
        open_source(split_spec(spec)[0], "validation")


def test_names_that_clean_to_nothing_drop_no_image(tmp_path):
    spec = write(tmp_path, **{"(?)_test.txt": "000001  1\n000002 -1\n000003  1\n"})
    source = open_evaluation(spec, cleaning="clip_lite")
    assert source.class_names == ("(?)", "cat", "dog") and source.notes == ()
    assert [source[i].captions for i in range(3)] == [("dog",), ("cat", "dog"), ("",)]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"dog_test.txt": "000001 1\n000002 2\n"}, "dog_test.txt:2: expected an image and 1, 0 or"),
        ({"dog_test.txt": "000001\n"}, "dog_test.txt:1: expected an image and 1, 0 or -1"),
        ({"dog_test.txt": "000001 1\n000001 1\n"}, "dog_test.txt:2: .* 000001 is listed twice"),
        ({"dog_test.txt": "000001 1\n"}, "dog_test.txt: does not list the same images as .*cat_te"),
        ({"dog_test.txt": None}, "cannot read .*dog_test.txt: No such file"),
        ({"dog_test.txt": b"\xff 1"}, "dog_test.txt: not UTF-8"),
        (dict.fromkeys(LISTS), "no lists of a class's images, such as dog_test.txt, in .*Main"),
        (
            {"cat_test.txt": None, "dog_test.txt": None},
            "has no test split, only train, val, trainv",
        ),
        ({"cat_test.txt": "", "dog_test.txt": ""}, "the test split of the dataset .* is empty"),
    ],
)
def test_wrong_lists(tmp_path, lists, message):
    with pytest.raises(UserError, match=message) as caught:
        open_evaluation(write(tmp_path, **lists))
    assert "\n" not in str(caught.value)


def test_which_year(tmp_path):
    with pytest.raises(UserError, match="no ImageSets/Main in .*: expected what the archives"):
        open_evaluation(f"voc:{tmp_path}")
    with pytest.raises(UserError, match="no such folder"):
        open_evaluation(f"voc:{tmp_path / 'none'}")
    years = [write(tmp_path / f"VOC20{year}") for year in ("07", "12")]
    with pytest.raises(UserError, match=f"several years: name one, {years[0]} or {years[1]}"):
        open_evaluation(f"voc:{tmp_path}")
