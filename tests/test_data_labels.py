"""JSONL rows with a class or several."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.opening import open_evaluation, open_source


def write(folder, rows):
    rows = [{"file": f"{number}.png", **row} for number, row in enumerate(rows)]
    for row in rows:
        Image.new("RGB", (4, 4)).save(folder / row["file"])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"jsonl:{folder / 'rows.jsonl'}"


def test_a_label_a_row(tmp_path):
    spec = write(
        tmp_path,
        [
            {"label": "tabby  cat"},
            {"label": "Zebra!", "caption": "a striped horse", "split": "test"},
            {"caption": "nobody knows"},
            {"label": "ant", "caption": " "},
            {"label": "(?)", "caption": "odd"},
        ],
    )
    train = pickle.loads(pickle.dumps(open_source(spec, "train")))
    assert train.class_names == ("(?)", "Zebra!", "ant", "tabby cat")
    assert [train[index].label for index in range(4)] == [3, -1, 2, 0]
    captions = [("tabby cat",), ("nobody knows",), ("ant",), ("odd",)]
    assert [train[index].captions for index in range(4)] == captions
    assert list(train.captions()) == [text for (text,) in captions]
    test = open_evaluation(spec, cleaning="clip_lite")
    assert (test[0].label, test[0].captions) == (1, ("a striped horse",))
    assert not hasattr(test, "targets")
    together = open_evaluation(f"{spec}#all")
    assert [together[index].label for index in range(5)] == [3, -1, 2, 0, 1]


def test_a_label_that_cleans_to_nothing(tmp_path):
    spec = write(tmp_path, [{"label": "dog"}, {"label": "(?)"}])
    options = {"cleaning": "clip_lite", "max_skipped_share": 0.5}
    source = open_source(spec, "train", **options)
    assert len(source) == 1 and source[0].label == 1
    assert "1 of 2 rows have no caption (of 1, nothing is left" in source.notes[0]


def test_several_labels_a_row(tmp_path):
    spec = write(
        tmp_path,
        [
            {"labels": ["dog", "cat", "dog"]},
            {"labels": []},
            {"labels": ["(?)"], "caption": ""},
            {"labels": ["ant"], "caption": "an ant", "split": "val"},
        ],
    )
    source = pickle.loads(pickle.dumps(open_source(spec, "train", cleaning="clip_lite")))
    assert source.class_names == ("(?)", "ant", "cat", "dog")
    expected = [[-1, -1, 1, 1], [-1] * 4, [1, -1, -1, -1]]
    assert source.targets().tolist() == expected and source.targets().dtype == np.int8
    assert [source[index].captions for index in range(3)] == [("dog", "cat"), ("",), ("",)]
    assert [source[index].label for index in range(3)] == [-1] * 3
    assert list(source.captions()) == ["dog", "cat"] and source.notes == ()
    validation = open_evaluation(spec)
    assert validation.targets().tolist() == [[-1, 1, -1, -1]]
    assert validation[0].captions == ("an ant",)
    assert open_evaluation(f"{spec}#all").targets().tolist() == [*expected, [-1, 1, -1, -1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": ["a"]}, 'rows.jsonl:2: has "labels", but line 1 has "label"'),
        ({"label": 3}, 'rows.jsonl:2: "label" must be a text, found a number'),
        ({"labels": "cat"}, 'rows.jsonl:2: "labels" must be a list of texts'),
        ({"labels": ["a"], "label": "a"}, 'rows.jsonl:2: has both "label" and "labels"'),
        ({"label": " "}, "rows.jsonl:2: a label must not be empty"),
    ],
)
def test_malformed_labels(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(write(tmp_path, [{"label": "cat"}, row]), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"labels": []}, {"caption": "x"}],
            'rows.jsonl:2: has no label, but line 1 has "labels": where some .* all need them',
        ),
        (
            [{"caption": "x"}, {"caption": "x", "labels": []}],
            'rows.jsonl:2: has "labels", but line 1 has no label',
        ),
    ],
)
def test_rows_without_labels_among_several(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path, rows), "train")


def test_rows_of_one_image_and_several_labels(tmp_path):
    spec = write(
        tmp_path,
        [
            {"file": "a.png", "labels": ["dog", "cat"]},
            {"file": "b.png", "labels": []},
            {"file": "a.png", "labels": ["ant", "dog"], "caption": "an ant on a dog"},
        ],
    )
    source = open_source(spec, "train")
    assert source.class_names == ("ant", "cat", "dog")
    assert source.targets().tolist() == [[1, 1, 1], [-1, -1, -1]]
    assert [source[index].captions for index in range(2)] == [("an ant on a dog",), ("",)]


def test_rows_of_one_image_and_another_class_stay_apart(tmp_path):
    rows = [{"file": "a.png", "label": label} for label in ("dog", "cat", "dog")]
    source = open_source(write(tmp_path, rows), "train")
    assert [source[index].label for index in range(len(source))] == [1, 0]
    assert source.notes == ("3 rows are of 2 images: rows of one image are one record",)
