"""Image datasets as a model sees them: opened and embedded once, whoever asks for them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float, Int, Int8, UInt8
from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError
from mlip_jax.core.progress import track
from mlip_jax.data.batches.training import evaluation_batches
from mlip_jax.data.sets.held_out import overlap
from mlip_jax.data.sets.opening import (
    held_out_share,
    open_evaluation,
    open_source,
    open_training,
    open_validation,
    own_set,
    split_spec,
)
from mlip_jax.data.sets.records import MissingSplit, MultiLabel, Source
from mlip_jax.evaluations.interface import Encoder

# Sets whose captions after the first are aliases of the concept, not descriptions of the image.
TEXTS = 8192  # captions that are tokenised or embedded at a time
_FIRST_CAPTION_ONLY = frozenset({"emoji"})
# Their files are called alike everywhere; the first two carry the split in their own name.
_NAMED_BY_THEMSELVES = ("coco", "karpathy", "voc")


@dataclass(frozen=True)
class EmbeddedSet:
    """A dataset's readable images as the model sees them, with what is known of each."""

    source: Source
    name: str  # as the figures' keys carry it
    embeddings: Float[np.ndarray, "images width"] | None  # in the joint space; None: not asked for
    features: Float[np.ndarray, "images feature_width"] | None  # before it; None: not asked for
    indices: Int[np.ndarray, " images"]  # place in the source
    captions: tuple[tuple[str, ...], ...]  # those that count for retrieval
    labels: Int[np.ndarray, " images"]  # -1: none
    equal: Int[np.ndarray, " images"]  # a number, the same for images of equal bytes
    unreadable: tuple[str, ...]  # names

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def targets(self) -> Int8[np.ndarray, "images classes"]:
        """1 where an image shows a class, -1 where not, 0 where it is too difficult to count.

        Of a dataset with one class an image, a single 1 a row; rows of -1 have no class at all.
        """
        classes = len(self.source.class_names)
        if isinstance(self.source, MultiLabel):
            return self.source.targets()[self.indices]
        return np.where(self.labels[:, None] == np.arange(classes), 1, -1).astype(np.int8)

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes, so that `labels` are all -1."""
        return isinstance(self.source, MultiLabel)

    def take(self, rows: Int[np.ndarray, " rows"]) -> EmbeddedSet:
        """The dataset with some of its images alone."""
        return replace(
            self,
            embeddings=None if self.embeddings is None else self.embeddings[rows],
            features=None if self.features is None else self.features[rows],
            indices=self.indices[rows],
            captions=tuple(self.captions[row] for row in rows),
            labels=self.labels[rows],
            equal=self.equal[rows],
        )

    def omissions(self) -> str:
        """Sentences on what was left out, each after a space; "" when nothing was."""
        return omissions(self.source, self.unreadable)


class _How(TypedDict):
    """How sets are opened."""

    cache_dir: str
    cleaning: str


class Sets:
    """The datasets of an evaluation by their spec, each embedded once.

    "validation" stands for the run's own validation set, and its training set for that one's
    training split.
    """

    def __init__(
        self,
        model: Encoder | None,
        config: ConfigDict,
        validation: Source | None = None,
        progress: bool = True,
    ) -> None:
        """Takes the run's validation set if it is open already.

        Without a model, datasets can be opened but not embedded.
        """
        self._model = model
        self.config = config
        self.progress = progress
        self._validation = validation
        self._opened: dict[tuple[str, str], Source | None] = {}
        self._embedded: dict[tuple[str, str], EmbeddedSet] = {}
        self._names: dict[str, str] = {}

    def under(self, config: ConfigDict) -> Sets:
        """The same datasets, opened and embedded already, for figures by other prompts or rates.

        Args:
          config: one with the same model and data.
        """
        sets = copy.copy(self)
        sets.config = config
        return sets

    def seen_by(self, model: Encoder) -> Sets:
        """The same datasets, opened already, for another model."""
        sets = copy.copy(self)
        sets._model, sets._embedded = model, {}
        return sets

    def seen_by_each(self, models: Sequence[Encoder], spec: str) -> list[Sets]:
        """As `seen_by` for several models; one dataset is decoded once, for all of them.

        Args:
          models: of one preprocessing, and of embeddings of one width.
          spec: of that dataset.

        Raises:
          UserError: as `evaluation`.
        """
        together = self.seen_by(_Together(models)).evaluation(spec)
        each = [self.seen_by(model) for model in models]
        if together is not None and together.embeddings is not None:
            parts = np.split(together.embeddings, len(models), axis=1)
            for sets, part in zip(each, parts, strict=True):
                sets._embedded[spec, "evaluation"] = replace(together, embeddings=part)
        return each

    @property
    def model(self) -> Encoder:
        """What embeds the datasets."""
        assert self._model is not None  # only checks go without, and they embed nothing
        return self._model

    def source(self, spec: str) -> Source | None:
        """The dataset to evaluate on; None for "validation" where the run has none.

        Raises:
          UserError: when it cannot be opened.
        """
        if (spec, "evaluation") not in self._opened:
            opened: Source | None
            if spec != "validation":
                opened = open_evaluation(spec, **self._how)
            elif self._validation is not None:
                opened = self._validation
            else:
                opened = open_validation(self.config.data, self.config.model.text.cleaning)
            self._opened[spec, "evaluation"] = opened
        return self._opened[spec, "evaluation"]

    def training_source(self, spec: str) -> Source | None:
        """The training split that goes with the dataset; None where all of it is for evaluation.

        Raises:
          UserError: when it cannot be opened.
        """
        if (spec, "training") not in self._opened:
            opened = None
            is_validation = spec == "validation"
            if is_validation and held_out_share(self.config.data):
                opened = open_training(self.config.data, self.config.model.text.cleaning)
            elif not is_validation or self.config.data.validation == "auto":
                training_spec = own_set(self.config.data) if is_validation else split_spec(spec)[0]
                try:
                    opened = open_source(training_spec, "train", **self._how)
                except MissingSplit:
                    opened = None
            evaluation = self.source(spec)
            if opened is not None and overlap(opened.parts, evaluation.parts if evaluation else ()):
                opened = None  # what is evaluated on is not for training
            self._opened[spec, "training"] = opened
        return self._opened[spec, "training"]

    def name(self, spec: str) -> str:
        """What figures call the dataset: the spec's last word, with a number where two share it."""
        if spec not in self._names:
            source = self.source(spec)
            if source is None:
                name = spec  # "validation": any other dataset can be opened
            elif spec == "validation":
                name = short_name(source.name)
            else:
                name = short_name(spec, source.name)
            known_names = self._names.values()
            numbers = (f"{name}-{number}" for number in range(2, len(known_names) + 3))
            self._names[spec] = next(word for word in (name, *numbers) if word not in known_names)
        return self._names[spec]

    def evaluation(self, spec: str, *, features: bool = False) -> EmbeddedSet | None:
        """The dataset, embedded in the joint space, or with the features before it instead.

        None for "validation" where the run has no validation set.

        Raises:
          UserError: when it cannot be opened, is empty, or too much of it cannot be read.
        """
        source = self.source(spec)
        return None if source is None else self._embed(spec, source, "evaluation", features)

    def train_and_test(self, spec: str) -> tuple[EmbeddedSet, EmbeddedSet, str] | None:
        """Features of what a classifier is trained on and of what it is tested on.

        A dataset with a single split is cut in halves by a hash of the images' names.

        Returns:
          Both, and a sentence on where they come from; None for "validation" where the run has no
          validation set.

        Raises:
          UserError: as `evaluation`.
        """
        test = self.evaluation(spec, features=True)
        if test is None:
            return None
        check_classes(test, spec)
        source = self.training_source(spec)
        if source is not None:
            train = self._embed(spec, source, "training", True)
            return train, test, f"trained on {len(train):,} images of the split {source.split!r}"
        half = np.array([_is_for_training(test.source.name_of(int(i))) for i in test.indices])
        train, test = test.take(np.flatnonzero(half)), test.take(np.flatnonzero(~half))
        return (
            train,
            test,
            (
                f"the dataset has one split: {len(train):,} images, chosen by a hash of their "
                "names, are for training"
            ),
        )

    @property
    def _how(self) -> _How:
        return {
            "cache_dir": self.config.data.cache_dir,
            "cleaning": self.config.model.text.cleaning,
        }

    def _embed(self, spec: str, source: Source, role: str, features: bool) -> EmbeddedSet:
        before = self._embedded.get((spec, role))
        if before is not None and (before.features if features else before.embeddings) is not None:
            return before
        embedded = embed_source(
            self.model,
            source,
            self.name(spec),
            self.config.evaluation.batch_size,
            features=features,
            max_skipped_share=self.config.data.max_skipped_share,
            progress=self.progress,
        )
        if before is not None:
            # The readable images are the same, in the same order.
            if features:
                embedded = replace(embedded, embeddings=before.embeddings)
            else:
                embedded = replace(embedded, features=before.features)
        self._embedded[spec, role] = embedded
        return embedded


class _Together:
    """Several models as one: their embeddings of an image stand side by side."""

    def __init__(self, models: Sequence[Encoder]) -> None:
        self._models = models

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models[0], name)

    def encode_image_pixels(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> Float[np.ndarray, "images widths"]:
        rows = [model.encode_image_pixels(images) for model in self._models]
        return np.concatenate(rows, axis=1)


def embed_texts(
    model: Encoder, texts: Sequence[str], name: str, progress: bool = True
) -> Float[np.ndarray, "texts width"]:
    """Embeds the texts of a dataset, some thousand at a time.

    Args:
      model: what embeds them.
      texts: the texts.
      name: what the bar calls the dataset.
      progress: whether to draw a bar.
    """
    starts = track(range(0, len(texts), TEXTS), f"Embedding captions of {name}", shown=progress)
    return np.concatenate(
        [np.asarray(model.encode_text(texts[start : start + TEXTS])) for start in starts]
    )


def embed_source(
    model: Encoder,
    source: Source,
    name: str,
    batch_size: int,
    limit: int | None = None,
    *,
    features: bool = False,
    max_skipped_share: float = 1.0,
    progress: bool = True,
) -> EmbeddedSet:
    """Embeds a source's images, the first `limit` of them if given; leaves unreadable ones out.

    Args:
      model: what embeds them.
      source: a dataset.
      name: what figures and errors call it.
      batch_size: images a call.
      limit: how many images, from the first.
      features: the features before the projection in place of embeddings in the joint space.
      max_skipped_share: more unreadable images than this are an error.
      progress: whether to draw a bar.

    Raises:
      UserError: for an empty dataset, or when too many images or all of them cannot be read.
    """
    size = len(source) if limit is None else min(limit, len(source))
    if not size:
        raise UserError(f"the dataset {name!r} is empty: there is nothing to evaluate on")
    batches = evaluation_batches(source, model.preprocess, batch_size)
    count = track(range(-(-size // batch_size)), f"Embedding {name}", shown=progress)
    embed = model.image_features if features else model.encode_image_pixels
    captions: list[tuple[str, ...]] = []
    parts, indices, labels, unreadable = [], [], [], []
    equal: list[int] = []
    numbers: dict[bytes, int] = {}
    for _, batch in zip(count, batches, strict=False):
        rows = np.flatnonzero(batch.readable & (batch.indices < size))
        # The whole batch, so that every call has one shape and the model compiles once.
        parts.append(np.asarray(embed(batch.images), np.float32)[rows])
        indices.extend(batch.indices[rows].tolist())
        captions.extend(batch.captions[row] for row in rows)
        labels.extend(batch.labels[rows].tolist())
        equal.extend(numbers.setdefault(batch.digests[row], len(numbers)) for row in rows)
        unreadable.extend(batch.unreadable)
    if not indices:
        raise UserError(f"none of the {size:,} images of the dataset {name!r} can be read")
    if len(unreadable) > max_skipped_share * size:
        raise UserError(
            f"{len(unreadable):,} of {size:,} images of the dataset {name!r} cannot be read, the "
            f"first: {unreadable[0]}; more than "
            f"config.data.max_skipped_share={max_skipped_share:g} allows"
        )
    classes = len(source.class_names)
    wrong = next((row for row, label in enumerate(labels) if label >= classes), None)
    if classes and wrong is not None:
        raise UserError(
            f"the dataset {name!r}: the label {labels[wrong]} of {source.name_of(indices[wrong])} "
            f"is out of range: there are {classes} classes"
        )
    captions = [captions_that_count(source, image_captions) for image_captions in captions]
    rows = np.concatenate(parts)
    return EmbeddedSet(
        source=source,
        name=name,
        embeddings=None if features else rows,
        features=rows if features else None,
        indices=np.array(indices),
        captions=tuple(captions),
        labels=np.array(labels),
        equal=np.array(equal),
        unreadable=tuple(unreadable),
    )


def check_classes(embedded: EmbeddedSet, spec: str) -> None:
    """Finds class folders without images, which are a mistake more often than not.

    Args:
      embedded: what is evaluated on.
      spec: the dataset; of other kinds than class folders, classes may well have no image in
        a split.

    Raises:
      UserError: for the first such class.
    """
    if not spec.startswith(("folder:", "zip:")):
        return
    has_images = (embedded.targets == 1).any(axis=0)
    for name, present in zip(embedded.source.class_names, has_images, strict=True):
        if not present:
            raise UserError(f"the class {name!r} of the dataset {spec!r} has no readable image")


def captions_that_count(source: Source, captions: tuple[str, ...]) -> tuple[str, ...]:
    """Those of an image's captions that describe it, and are no other names of it."""
    return captions[:1] if source.name in _FIRST_CAPTION_ONLY else captions


def omissions(source: Source, unreadable: Sequence[str]) -> str:
    """Sentences on what a source leaves out, and what could not be read; each after a space."""
    sentences = [f" {note.rstrip('.')}." for note in source.notes]
    if unreadable:
        sentences.append(
            f" {len(unreadable):,} unreadable images are left out, the first: {unreadable[0]}."
        )
    return "".join(sentences)


def short_name(spec: str, own_name: str = "") -> str:
    """The name of a dataset in a figure's key, a split that the spec pins included.

    "jsonl:/data/birds.jsonl" -> "birds"; "coco:/data/coco#test" -> "coco-test".

    Args:
      spec: the dataset.
      own_name: what it calls itself; of kinds whose files are called alike everywhere, that is its
        name.
    """
    where, split = split_spec(spec)
    kind, colon, path = where.partition(":")
    name = Path(path if colon else kind).stem or kind
    if kind == "objects" and name == "objects":
        name = Path(path).absolute().parent.name or name
    if own_name and kind in _NAMED_BY_THEMSELVES:
        name = own_name
        split = split if kind == "voc" else ""
    return f"{name}-{split}" if split else name


def _is_for_training(name: str) -> bool:
    # The folders above the last would make the halves depend on where the dataset lies.
    return bool(hashlib.sha256("/".join(Path(name).parts[-2:]).encode()).digest()[0] & 1)
