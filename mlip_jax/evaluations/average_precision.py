"""Average precision of a ranking, counted in two ways, and what a random order gives.

Equal scores are one step of the ranking: all of them count before the precision is taken, so that
no order among them is chosen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int8, Shaped
from sklearn.metrics import average_precision_score, precision_recall_curve

from mlip_jax.core.errors import RunError, UserError

_LEVELS = 10  # recall 0, 1/10, ..., 1


@dataclass(frozen=True)
class ClassMeans:
    """Average precision of the classes that have a positive, and the means over them."""

    classes: Int[np.ndarray, " counted"]  # indices
    per_class: Float[np.ndarray, " counted"]  # `step_sum` of each
    step_sum: float
    eleven_point: float
    chance: float  # of step_sum
    eleven_point_chance: float


def mean_over_classes(
    targets: Int8[np.ndarray, "images classes"], scores: Float[np.ndarray, "images classes"]
) -> ClassMeans:
    """The mean average precision over the classes that some image shows.

    Args:
      targets: 1 where an image shows a class, -1 where not; 0: left out for that class.
      scores: the higher, the likelier.

    Raises:
      UserError: where no class has a positive.
      RunError: for NaN among the scores.
    """
    classes = np.flatnonzero((targets == 1).any(axis=0))
    if not classes.size:
        raise UserError("average precision needs at least one positive")
    rows = []
    for index in classes:
        counted = targets[:, index] != 0
        class_targets, ranked = targets[counted, index], scores[counted, index]
        sizes = int((class_targets == 1).sum()), len(class_targets)
        rows.append(
            (
                step_sum(class_targets, ranked),
                eleven_point(class_targets, ranked),
                expected(*sizes),
                expected_eleven_point(*sizes),
            )
        )
    means = [float(mean) for mean in np.mean(rows, axis=0)]
    return ClassMeans(classes, np.array([row[0] for row in rows]), *means)


def step_sum(labels: Shaped[np.ndarray, " images"], scores: Float[np.ndarray, " images"]) -> float:
    """The sum over steps of precision times the gain in recall, in [0, 1]; scikit-learn's.

    Args:
      labels: above 0 for a positive; anything else is a negative.
      scores: the higher, the earlier.

    Raises:
      UserError: without a positive.
      RunError: for NaN among the scores.
    """
    positive = _checked(labels, scores)
    return float(average_precision_score(positive, scores))


def eleven_point(
    labels: Shaped[np.ndarray, " images"], scores: Float[np.ndarray, " images"]
) -> float:
    """The mean of the best precision at a recall of at least 0, 0.1, ..., 1, in [0, 1].

    The measure of PASCAL VOC until 2009 (Everingham et al., 2010, section 4.2). Arguments and
    errors as in `step_sum`.
    """
    positive = _checked(labels, scores)
    precision, recall, _ = precision_recall_curve(positive, scores)
    # The last point, precision 1 at recall 0, is drawn for plots and belongs to no image.
    precision, recall = precision[:-1], recall[:-1]
    levels = np.arange(_LEVELS + 1) / _LEVELS
    return float(np.mean([precision[recall >= level].max() for level in levels]))


@functools.cache
def expected(positives: int, total: int) -> float:
    """What `step_sum` gives, on average, for a random order: the exact expectation.

    An image at place k is a positive in R of N cases, and each of the k - 1 before it is another
    one in (R - 1) of (N - 1).

    Args:
      positives: R, at least 1.
      total: N.
    """
    places = np.arange(1, total + 1)
    positive_share = (positives - 1) / (total - 1) if total > 1 else 0.0
    return float(np.mean((1 + (places - 1) * positive_share) / places))


@functools.cache
def expected_eleven_point(positives: int, total: int, orders: int = 200) -> float:
    """What `eleven_point` gives for a random order: the mean over some, the same in every call.

    Args:
      positives: at least 1.
      total: positives and negatives.
      orders: how many.
    """
    # Other sizes have other orders, so that errors average out over a dataset's classes.
    rng = np.random.default_rng((positives, total))
    draws = (rng.choice(total, positives, replace=False, shuffle=False) for _ in range(orders))
    return float(np.mean([_eleven_point_of(np.sort(places) + 1) for places in draws]))


def _eleven_point_of(places: Int[np.ndarray, " positives"]) -> float:
    """`eleven_point` of an order without ties whose positives stand at these places, from 1."""
    precision = np.arange(1, len(places) + 1) / places
    best_from = np.maximum.accumulate(precision[::-1])[::-1]
    needed = -(-np.arange(_LEVELS + 1) * len(places) // _LEVELS)  # positives for each recall
    return float(np.mean(best_from[np.maximum(needed, 1) - 1]))


def _checked(
    labels: Shaped[np.ndarray, " images"], scores: Float[np.ndarray, " images"]
) -> Shaped[np.ndarray, " images"]:
    """Which images are positives, where that ranks anything at all."""
    damaged = np.flatnonzero(np.isnan(scores))
    if damaged.size:
        raise RunError(
            f"{damaged.size} of {len(scores)} scores are NaN; the first is index {damaged[0]}"
        )
    positive = np.asarray(labels) > 0
    if not positive.any():
        raise UserError("average precision needs at least one positive")
    return positive
