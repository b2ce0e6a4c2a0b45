"""Sources kept by TensorFlow Datasets as ArrayRecord files; TensorFlow itself is not needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int8

from mlip_jax.core.errors import UserError, first_line
from mlip_jax.data.sets import emoji
from mlip_jax.data.sets.files import present_names
from mlip_jax.data.sets.kinds import DatasetKind, Opening
from mlip_jax.data.sets.records import Record
from mlip_jax.data.sets.splits import STANDARD, Choice
from mlip_jax.data.text.captions import usable

_CAPTION_NAMES = ("caption", "captions", "text", "description", "title", "sentence")


class TfdsSource:
    """A prepared TFDS dataset. Examples are (image, captions or a class label).

    The feature that holds the image is the Image called "image", the label the ClassLabel called
    "label", else the first of its type by name. The caption is the first Text (or sequence of
    Text) that is called like one, else the class name.
    """

    attribution = ""
    notes: tuple[str, ...] = ()

    def __init__(self, folder: str, choice: Choice, *, name: str, cleaning: str = "none") -> None:
        """Opens what was prepared in `folder`, a TFDS version folder."""
        self.name = name
        self.split, self.parts = choice
        self._folder = folder
        self._tfds_split = "+".join(self.parts)
        self._cleaning = cleaning
        self._lock = threading.Lock()
        self._examples: Sequence[Mapping[str, Any]] | None = None
        builder = tfds.builder_from_directory(folder)
        features = builder.info.features
        self._length = builder.info.splits[self._tfds_split].num_examples
        self._image, self._text, self._label = _roles(features, name)
        label = _class_label(features[self._label]) if self._label else None
        self.class_names = tuple(_words(word) for word in label.names) if label else ()

    def __getstate__(self) -> dict[str, Any]:
        # Open files and locks stay in their process.
        return {**self.__dict__, "_lock": None, "_examples": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return self._record(self._example(index), index)

    def name_of(self, index: int) -> str:
        """The example's id, or its place in the dataset."""
        return self._name(self._example(index), index)

    def captions(self) -> Iterator[str]:
        """Every caption and tag of the split; images are not decoded."""
        for index in range(len(self)):
            record = self[index]
            yield from filter(None, (*record.captions, *record.tags))

    def _record(self, example: Mapping[str, Any], index: int) -> Record:
        label = int(example[self._label]) if self._label else -1
        captions = self._texts(example[self._text]) if self._text else ()
        if not captions and label >= 0:
            captions = usable([self.class_names[label]], self._cleaning)
        return Record(
            image=example[self._image],
            captions=captions or ("",),
            tags=(),
            label=label,
            name=self._name(example, index),
        )

    def _example(self, index: int) -> Mapping[str, Any]:
        if self._examples is None:
            with self._lock:
                if self._examples is None:
                    builder = tfds.builder_from_directory(self._folder)
                    self._examples = builder.as_data_source(
                        self._tfds_split, decoders={self._image: tfds.decode.SkipDecoding()}
                    )
        return self._examples[index]

    def _texts(self, value: Any) -> tuple[str, ...]:
        values = [value] if isinstance(value, bytes) else list(value)
        return usable((text.decode("utf-8", "replace") for text in values), self._cleaning)

    def _name(self, example: Mapping[str, Any], index: int) -> str:
        for key in ("id", "file_name", "filename", "image/filename"):
            if isinstance(example.get(key), bytes):
                return example[key].decode()
        return f"{self.name}/{self._tfds_split}[{index}]"


class MultiLabelTfdsSource(TfdsSource):
    """A dataset with a sequence of ClassLabel, such as the "labels" of voc/2007.

    A class that is among these but not in "labels_no_difficult", where there is such a feature, is
    too difficult to count.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `TfdsSource`."""
        super().__init__(*args, **kwargs)
        features = tfds.builder_from_directory(self._folder).info.features
        without_difficult = f"{self._label}_no_difficult"
        self._without_difficult = (
            without_difficult if without_difficult in features else self._label
        )
        self._all: Int8[np.ndarray, "images classes"] | None = None

    def targets(self) -> Int8[np.ndarray, "images classes"]:
        """1 where an image shows a class, -1 where not, 0 where too difficult to count."""
        if self._all is None:  # once: it reads the whole dataset
            self._all = np.stack([self._row(self._example(index)) for index in range(len(self))])
        return self._all

    def _row(self, example: Mapping[str, Any]) -> Int8[np.ndarray, " classes"]:
        targets = np.full(len(self.class_names), -1, np.int8)
        targets[np.asarray(example[self._label], np.int64)] = 0
        targets[np.asarray(example[self._without_difficult], np.int64)] = 1
        return targets

    def _record(self, example: Mapping[str, Any], index: int) -> Record:
        captions = self._texts(example[self._text]) if self._text else ()
        return Record(
            image=example[self._image],
            captions=captions
            or present_names(self._row(example), self.class_names, self._cleaning),
            tags=(),
            label=-1,
            name=self._name(example, index),
        )


class EmojiSource(TfdsSource):
    """The embedded dataset (data/emoji.py)."""

    attribution = emoji.ATTRIBUTION

    def _record(self, example: Mapping[str, Any], index: int) -> Record:
        name = example["name"].decode()
        # One caption an image in validation: retrieval then has one right answer each way.
        aliases = self._texts(example["aliases"]) if self.split == "train" else ()
        tags = (_words(example[key].decode()) for key in ("category", "subcategory"))
        return Record(
            image=example["image"],
            captions=usable((name, *aliases), self._cleaning) or ("",),
            tags=usable(tags, self._cleaning),
            label=int(example["label"]),
            name=example["id"].decode(),
        )


def open_emoji(where: str, opening: Opening) -> EmojiSource:
    """The embedded dataset, built on first use. Captions and tags are cleaned.

    Raises:
      MissingSplit: when it has no such split.
      UserError: when it cannot be built.
    """
    del where
    choice = STANDARD.choose("'emoji'", opening.wanted, ("train", "validation"))
    folder = emoji.directory(opening.cache_dir)
    return EmojiSource(str(folder), choice, name="emoji", cleaning=opening.cleaning)


def open_tfds(name: str, opening: Opening) -> TfdsSource:
    """A TFDS dataset by name ("oxford_iiit_pet", "ns/name:1.0.0") or by its prepared folder.

    Datasets by name are downloaded and prepared by TFDS where they are not yet; some need
    TensorFlow for that and are refused. Captions are cleaned; an example without
    one that is usable has its class name, or an empty text.

    Raises:
      MissingSplit: when it has no such split (its "test" stands in for "validation").
      UserError: when it is unknown, cannot be prepared or holds no image with a text or label.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            builder = tfds.builder_from_directory(path)
        else:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
    except Exception as error:  # whatever the builder of a third party raises
        raise UserError(f"cannot open the dataset 'tfds:{name}': {first_line(error)}") from error
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"'tfds:{name}' is stored as {builder.info.file_format.value}: prepare it anew with "
            "file_format='array_record'"
        )
    choice = STANDARD.choose(f"'tfds:{name}'", opening.wanted, builder.info.splits)
    features = builder.info.features
    _, _, label = _roles(features, name)
    single = not label or isinstance(features[label], tfds.features.ClassLabel)
    kind = TfdsSource if single else MultiLabelTfdsSource
    return kind(str(builder.data_path), choice, name=builder.info.name, cleaning=opening.cleaning)


def _roles(features: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """The keys of the image, the caption ("": none) and the label or labels ("": none)."""
    # The order of a prepared dataset's features differs from process to process.
    names = sorted(features, key=lambda key: (key not in ("image", "label", "labels"), key))
    images = [key for key in names if isinstance(features[key], tfds.features.Image)]
    labels = [key for key in names if _class_label(features[key]) is not None]
    labels.sort(key=lambda key: not isinstance(features[key], tfds.features.ClassLabel))
    texts = [key for key in _CAPTION_NAMES if key in features and _is_text(features[key])]
    if not images or not (texts or labels):
        raise UserError(
            f"'tfds:{name}' does not hold images with captions or class labels: its features are "
            f"{', '.join(features)}"
        )
    return images[0], texts[0] if texts else "", labels[0] if labels else ""


def _class_label(feature: Any) -> tfds.features.ClassLabel | None:
    """What a label is, or each of a sequence of labels; None for any other feature."""
    inner = getattr(feature, "feature", feature)
    return inner if isinstance(inner, tfds.features.ClassLabel) else None


def _is_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, tfds.features.Text)


def _words(name: str) -> str:
    """A class or category name as words: "light & video" -> "light and video"."""
    return " ".join(name.replace("_", " ").replace("-", " ").replace("&", "and").split())


EMOJI = DatasetKind(open_emoji)
TFDS = DatasetKind(open_tfds, "NAME")
