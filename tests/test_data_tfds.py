"""Datasets that TFDS has prepared: captions, a class, several classes."""

import io
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mlip_jax.data.sets.opening import open_evaluation, open_source
from mlip_jax.data.sets.records import MissingSplit


class CaptionedShapes(tfds.core.GeneratorBasedBuilder):
    """A dataset as somebody else's TFDS builder makes it."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "label": tfds.features.ClassLabel(names=["a_square", "disc"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for index in range(count):
            png = io.BytesIO()
            Image.new("RGB", (8, 8)).save(png, "PNG")
            captions = [f"shape {index}", "a shape"] if index else []
            yield index, {"picture": png.getvalue(), "captions": captions, "label": index % 2}


def test_tfds_folder(tmp_path):
    builder = CaptionedShapes(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    train = open_source(f"tfds:{builder.data_path}", "train")
    assert len(train) == 4 and train.class_names == ("a square", "disc")
    records = [pickle.loads(pickle.dumps(train))[index] for index in range(4)]
    captions = {record.captions for record in records}
    # Without a caption, the name of the class is one.
    assert captions == {("a square",), *((f"shape {i}", "a shape") for i in (1, 2, 3))}
    assert {record.label for record in records} == {0, 1}
    assert records[0].image.startswith(b"\x89PNG")
    assert list(train.captions()) == [text for record in records for text in record.captions]
    validation = open_source(f"tfds:{builder.data_path}", "validation")
    assert (len(validation), validation.split, validation.parts) == (2, "validation", ("test",))


def test_which_label(tmp_path):
    class TwoLabels(CaptionedShapes):
        def _info(self):
            names = {"label": ["fine"], "a_label": ["coarse"]}
            features = {key: tfds.features.ClassLabel(names=value) for key, value in names.items()}
            features["image"] = tfds.features.Image(encoding_format="png")
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _generate_examples(self, count):
            for index, example in super()._generate_examples(count):
                yield index, {"image": example["picture"], "label": 0, "a_label": 0}

    builder = TwoLabels(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    assert open_evaluation(f"tfds:{builder.data_path}").class_names == ("fine",)


def test_cleaned_tfds(tmp_path):
    class Shouted(CaptionedShapes):
        def _generate_examples(self, count):
            for index, example in super()._generate_examples(count):
                texts = [text.upper() + "!" for text in example["captions"]] or ["?"]
                yield index, {**example, "captions": [*texts, *example["captions"]]}

    builder = Shouted(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    train = open_source(f"tfds:{builder.data_path}", "train", cleaning="clip_lite")
    captions = {train[index].captions for index in range(4)}
    assert captions == {("a square",), *((f"shape {i}", "a shape") for i in (1, 2, 3))}


CLASSES = ["aeroplane", "potted_plant", "tv-monitor"]


class Objects(tfds.core.GeneratorBasedBuilder):
    """Several classes an image, laid out as TFDS's voc/2007."""

    VERSION = tfds.core.Version("1.0.0")
    SURE = True

    def _info(self):
        labels = tfds.features.Sequence(tfds.features.ClassLabel(names=CLASSES))
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "objects": tfds.features.Sequence({"label": tfds.features.ClassLabel(names=CLASSES)}),
            "labels": labels,
        }
        if self.SURE:
            features["labels_no_difficult"] = labels
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(1), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for index, (labels, sure) in enumerate([([0, 2], [2]), ([], []), ([1, 0], [1, 0])][:count]):
            png = io.BytesIO()
            Image.new("RGB", (8, 8)).save(png, "PNG")
            example = {
                "image": png.getvalue(),
                "objects": [{"label": label} for label in labels],
                "labels": labels,
            }
            yield index, {**example, "labels_no_difficult": sure} if self.SURE else example


class UnsureObjects(Objects):
    SURE = False


@pytest.mark.parametrize(("kind", "difficult"), [(Objects, 0), (UnsureObjects, 1)])
def test_several_labels(tmp_path, kind, difficult):
    builder = kind(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = pickle.loads(pickle.dumps(open_evaluation(f"tfds:{builder.data_path}")))
    assert source.class_names == ("aeroplane", "potted plant", "tv monitor")
    expected = {(difficult, -1, 1), (-1, -1, -1), (1, 1, -1)}
    targets = source.targets()
    assert targets.dtype == np.int8 and set(map(tuple, targets.tolist())) == expected
    for row, index in zip(targets, range(3), strict=True):
        names = tuple(np.array(source.class_names)[row == 1].tolist())
        assert source[index].captions == (names or ("",)) and source[index].label == -1


def test_pinned_splits(tmp_path):
    builder = CaptionedShapes(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    spec = f"tfds:{builder.data_path}"
    assert not hasattr(open_evaluation(spec), "targets")
    for split, parts, count in (
        ("test", ("test",), 2),
        ("train", ("train",), 4),
        ("all", ("test", "train"), 6),
    ):
        source = open_evaluation(f"{spec}#{split}")
        assert (source.split, sorted(source.parts), len(source)) == (split, list(parts), count)
        assert source[count - 1].image.startswith(b"\x89PNG")
    with pytest.raises(MissingSplit, match="no split 'tset', only .*did you mean 'test'"):
        open_evaluation(f"{spec}#tset")
    with pytest.raises(MissingSplit, match="'emoji' has no split 'test', only train, validation"):
        open_evaluation("emoji#test")
