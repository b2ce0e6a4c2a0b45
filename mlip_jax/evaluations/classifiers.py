"""What classifiers on frozen features share: datasets, linear maps, ranks, ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Int
from threadpoolctl import threadpool_limits

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.records import MultiLabel, Source
from mlip_jax.evaluations.scores import on_grid
from mlip_jax.evaluations.sets import EmbeddedSet, Sets

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Sums that several threads share differ in their last bits from machine to machine, and threads
# that wait for each other on busy cores are slower than one by far.
on_one_thread: Callable[[_Function], _Function] = threadpool_limits.wrap(limits=1)

_NAMES_SHOWN = 5


class Parts(NamedTuple):
    """What a classifier is trained on and tested on; every image has a class or targets."""

    train: EmbeddedSet
    test: EmbeddedSet
    note: str  # sentences on where they come from and what was left out

    def features(
        self,
    ) -> tuple[Float[np.ndarray, "training width"], Float[np.ndarray, "images width"]]:
        """Both parts' features, L2-normalised and on a grid, to train and to test on.

        Raises:
          RunError: for NaN or infinity among them.
        """
        train, test = self.train.features, self.test.features
        assert train is not None and test is not None  # `train_and_test` asks for them
        return (
            on_grid(train, f"training features of {self.test.name}"),
            on_grid(test, f"test features of {self.test.name}"),
        )


class Linear(NamedTuple):
    """Scores of classes, features @ weights + bias; a class with bias -inf is never right."""

    weights: Float[np.ndarray, "width classes"]
    bias: Float[np.ndarray, " classes"]


def check(sets: Sets, spec: str, family: str, multi_label: bool = False) -> None:
    """Raises UserError for a dataset that no classifier of the family can be trained on.

    Args:
      sets: what opens it.
      spec: the dataset.
      family: the key of config.evaluation that names it.
      multi_label: whether images that show several classes each will do.
    """
    source = sets.source(spec)
    fault = None if source is None else _fault(source, multi_label)
    if fault:
        raise UserError(f"config.evaluation.{family}: the dataset {spec!r} {fault}")


def open_parts(sets: Sets, spec: str, family: str, multi_label: bool = False) -> Parts | None:
    """The labelled images of a dataset, with features; arguments as in `check`.

    Returns:
      None for "validation" where the run has none that would do.

    Raises:
      UserError: for a dataset without labels, one of several classes an image where the family
        takes none, a label that is no class, or a part without an image.
    """
    source = sets.source(spec)
    if source is None or (spec == "validation" and _fault(source, multi_label)):
        return None
    check(sets, spec, family, multi_label)
    place = f"config.evaluation.{family}: the dataset {spec!r}"
    splits = sets.train_and_test(spec)
    if splits is None:
        return None
    whole_train, whole_test, origin = splits
    if whole_train.source.class_names != whole_test.source.class_names:
        raise UserError(f"{place} has other classes in its training split than in the one to test")
    train, test = _labelled(whole_train, place), _labelled(whole_test, place)
    if not len(train) and not len(test):
        if spec == "validation":
            return None
        raise UserError(f"{place} has no class labels")
    for part, purpose in ((train, "train"), (test, "test")):
        if not len(part):
            raise UserError(f"{place} has no image with a class to {purpose} on")
    note = f"{origin[0].upper()}{origin[1:]}.{whole_test.omissions()}"
    if whole_train.source is not whole_test.source:
        note += whole_train.omissions()
    unlabelled = len(whole_train) - len(train), len(whole_test) - len(test)
    if any(unlabelled):
        note += (
            f" {unlabelled[0]:,} images to train on and {unlabelled[1]:,} to test on have no class "
            "and are left out."
        )
    return Parts(train, test, note)


def named(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown


def untrained(train: EmbeddedSet, test: EmbeddedSet) -> str:
    """A sentence, after a space, on classes that have images in test alone; "" without any."""
    absent = np.setdiff1d(test.labels, train.labels)
    if not absent.size:
        return ""
    names = named([test.source.class_names[index] for index in absent])
    return f" {absent.size:,} classes have no training image and are always wrong: {names}."


def ranks(
    linear: Linear,
    features: Float[np.ndarray, "images width"],
    labels: Int[np.ndarray, " images"],
    chunk: int = 4096,
) -> Int[np.ndarray, " images"]:
    """The place of each image's own class, from 1; a class that ties with it stands before it.

    Args:
      linear: the classifier.
      features: as it was trained on.
      labels: the classes that are right.
      chunk: rows of scores at a time, which bound the memory.
    """
    image_ranks = np.empty(len(features), np.int64)
    for top in range(0, len(features), chunk):
        rows = slice(top, top + chunk)
        scores = features[rows] @ linear.weights + linear.bias
        right = np.take_along_axis(scores, labels[rows, None], axis=1)
        image_ranks[rows] = (scores >= right).sum(axis=1)
    return image_ranks


def place_in_class(labels: Int[np.ndarray, " images"]) -> Int[np.ndarray, " images"]:
    """How many images of its class come before each image."""
    order = np.argsort(labels, kind="stable")
    in_order = labels[order]
    places = np.empty(len(labels), np.int64)
    places[order] = np.arange(len(labels)) - np.searchsorted(in_order, in_order)
    return places


class Ridge:
    """Ridge regression on one-hot targets: one eigendecomposition for every strength.

    Features and targets are centred, so that the bias is not penalised.
    """

    def __init__(
        self,
        features: Float[np.ndarray, "images width"],
        labels: Int[np.ndarray, " images"],
        classes: int,
    ) -> None:
        """Decomposes the smaller of the Gram matrix of the features and that of the images."""
        self._mean = features.mean(axis=0)
        self._absent = np.bincount(labels, minlength=classes) == 0
        targets = np.eye(classes)[labels]
        self._share = targets.mean(axis=0)
        centred, targets = features - self._mean, targets - self._share
        if len(centred) > centred.shape[1]:
            values, vectors = scipy.linalg.eigh(centred.T @ centred)
            self._basis, self._projected = vectors, vectors.T @ (centred.T @ targets)
        else:
            values, vectors = scipy.linalg.eigh(centred @ centred.T)
            self._basis, self._projected = centred.T @ vectors, vectors.T @ targets
        self._values = np.maximum(values, 0)

    def solve(self, strength: float) -> Linear:
        """The solution for a penalty of `strength`, above 0, times the mean eigenvalue."""
        # Features that are all equal have no eigenvalue above 0 and no say either.
        penalty = strength * (self._values.mean() or 1.0)
        weights = self._basis @ (self._projected / (self._values + penalty)[:, None])
        bias = self._share - self._mean @ weights
        return Linear(weights, np.where(self._absent, -np.inf, bias))


def _fault(source: Source, multi_label: bool) -> str | None:
    """What is wrong with the dataset, as the end of a sentence."""
    if not source.class_names:
        return "has no class labels"
    if isinstance(source, MultiLabel) and not multi_label:
        return "has several classes an image: name it in config.evaluation.svm instead"
    return None


def _labelled(part: EmbeddedSet, place: str) -> EmbeddedSet:
    """The images that have a class; all of them where an image may show several or none."""
    if part.multi_label:
        return part
    classes = len(part.source.class_names)
    wrong: Bool[np.ndarray, " images"] = (part.labels < -1) | (part.labels >= classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
            f"{place}: {part.source.name_of(int(part.indices[row]))} has the label "
            f"{part.labels[row]}, but there are {classes:,} classes, from 0 to {classes - 1}"
        )
    return part.take(np.flatnonzero(part.labels >= 0))
