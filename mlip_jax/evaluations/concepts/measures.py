"""What is left of a concept in embeddings that are edited, and of what it is no part of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlip_jax.evaluations import retrieval
from mlip_jax.evaluations.interface import Encoder
from mlip_jax.evaluations.scores import on_grid

_FOLDS = 5  # of a probe
_STRENGTHS = {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}
_MOST = 2_000  # images a side in a probe, the first; bounds its time
THIRDS = 3
_RIDGES = np.logspace(-1, 4, 6)

Edited = Sequence[Float[np.ndarray, "images width"]]  # all images, edited for each third of them


@dataclass(frozen=True)
class Images:
    """All that is known of a concept's images."""

    embeddings: Float[np.ndarray, "images width"]
    captions: tuple[tuple[str, ...], ...]
    labels: Int[np.ndarray, " images"]
    training: Bool[np.ndarray, " images"]  # whether of the training split
    sides: Int[np.ndarray, " images"]  # 0, 1; -1: neither or both
    groups: Int[np.ndarray, " images"]  # images whose captions differ in the words alone share one

    @property
    def sided(self) -> Int[np.ndarray, " images"]:
        """The images that are on a side."""
        return np.flatnonzero(self.sides >= 0)


def side_probe(
    edited: Float[np.ndarray, "rows width"], images: Images, rows: Int[np.ndarray, " rows"]
) -> float:
    """Balanced accuracy of logistic regression for the side; its strength by an inner split."""
    sides, groups = images.sides[rows], images.groups[rows]
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=5_000)
    )
    predicted = np.empty_like(sides)
    outer = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=0)
    for train, test in outer.split(edited, sides, groups):
        search = GridSearchCV(
            classifier, _STRENGTHS, scoring="balanced_accuracy", cv=StratifiedGroupKFold(3)
        )
        search.fit(edited[train], sides[train], groups=groups[train])
        predicted[test] = search.predict(edited[test])
    return float(balanced_accuracy_score(sides, predicted))


def nearest_text(
    edited: Float[np.ndarray, "images width"],
    sides: Sequence[Float[np.ndarray, "texts width"]],
    images: Images,
) -> float:
    """Balanced accuracy of the nearer side's mean text."""
    means = on_grid(np.stack([texts.mean(axis=0) for texts in sides]), "text embeddings")
    rows = images.sided
    predicted = np.argmax(edited[rows] @ means.T, axis=1)
    return float(balanced_accuracy_score(images.sides[rows], predicted))


def first_of_each_side(
    images: Images, rows: Int[np.ndarray, " rows"] | None = None
) -> Int[np.ndarray, " kept"]:
    """Of the rows, by default all on a side, the first 2,000 of each side, in order."""
    rows = images.sided if rows is None else rows
    rows_by_side = [rows[images.sides[rows] == side][:_MOST] for side in (0, 1)]
    return np.sort(np.concatenate(rows_by_side))


def cut_in_thirds(images: Images, draw: int) -> Int[np.ndarray, " images"]:
    """0, 1 or 2 for each image; of those on a side, a group has one number."""
    thirds = np.arange(len(images.sides)) % THIRDS
    rows = images.sided
    splitter = StratifiedGroupKFold(THIRDS, shuffle=True, random_state=draw)
    parts = splitter.split(rows, images.sides[rows], images.groups[rows])
    for third, (_, members) in enumerate(parts):
        thirds[rows[members]] = third
    return thirds


def image_pairs(
    images: Images, rows: Int[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, "pairs width"], Float[np.ndarray, "pairs width"]]:
    """Of each group with images on both sides, the mean embedding of either."""
    means: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for group in np.unique(images.groups[rows]):
        members = rows[images.groups[rows] == group]
        first, second = (members[images.sides[members] == side] for side in (0, 1))
        if len(first) and len(second):
            means[0].append(images.embeddings[first].mean(axis=0))
            means[1].append(images.embeddings[second].mean(axis=0))
    return np.array(means[0]), np.array(means[1])


@dataclass(frozen=True)
class Task:
    """A task on images that are cut in thirds, each with its own editing."""

    score: Callable[[Edited, Int[np.ndarray, " images"]], float]  # edited, each image's third
    protocol: str
    chance: float
    examples: int


def classification(
    labels: Int[np.ndarray, " images"], training: Bool[np.ndarray, " images"]
) -> Task | None:
    """Accuracy of a ridge classifier on standardised embeddings, trained on edited ones.

    It is trained on the training images; where there are none, on the thirds that it is not tested
    on. Its strength is the best of leave-one-out on what it is trained on.

    Args:
      labels: -1: none.
      training: which images are for training.

    Returns:
      None for fewer than two classes.
    """
    tested = (labels >= 0) & ~training
    classes = np.unique(labels[labels >= 0])
    if len(classes) < 2 or not tested.any():
        return None
    trained = (labels >= 0) & training

    def score(edited: Edited, thirds: Int[np.ndarray, " images"]) -> float:
        right = 0
        for third, embeddings in enumerate(edited):
            test = tested & (thirds == third)
            train = trained if trained.any() else tested & (thirds != third)
            if not test.any():
                continue
            classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(_RIDGES))
            classifier.fit(embeddings[train], labels[train])
            right += int(np.sum(classifier.predict(embeddings[test]) == labels[test]))
        return right / int(tested.sum())

    # What the class most frequent in training gives.
    frequent = np.argmax(np.bincount(labels[trained if trained.any() else tested]))
    where = "training split" if trained.any() else "threefold cross-validation"
    return Task(
        score,
        f"accuracy of {len(classes)} classes, ridge, {where}",
        float(np.mean(labels[tested] == frequent)),
        int(tested.sum()),
    )


def finding(
    model: Encoder,
    captions: Sequence[Sequence[str]],
    training: Bool[np.ndarray, " images"],
    sides: Int[np.ndarray, " images"],
) -> Task:
    """Text-to-image R@1 of the images that are no training images and on neither side.

    Where there are fewer than two, of those on a side too. Texts are not edited.

    Args:
      model: what embeds the captions.
      captions: of each image.
      training: which images are left out.
      sides: -1: neither.
    """
    searchable = ~training & np.array(
        [any(text.strip() for text in image_captions) for image_captions in captions]
    )
    neither = searchable & (sides < 0)
    rows = np.flatnonzero(neither if neither.sum() > 1 else searchable)
    texts, pairs = retrieval.pair_captions([captions[row] for row in rows.tolist()], model.tokenize)
    embedded = np.asarray(model.encode_text(texts))
    key = "text_to_image_recall@1"

    def score(edited: Edited, thirds: Int[np.ndarray, " images"]) -> float:
        images = np.stack(list(edited))[thirds[rows], rows]
        return retrieval.recall(images, embedded, pairs, ks=(1,))[key]

    expected = retrieval.chance(pairs, len(rows), len(texts), ks=(1,))[key]
    return Task(score, "text-to-image R@1, images on neither side", expected, len(texts))
