"""One linear SVM a class on frozen features, scored by average precision.

The protocol for PASCAL VOC 2007 of VirTex (Desai and Johnson, 2021, section 4.1), which CLIP-Lite
follows: it takes any dataset whose images show several classes, and datasets of one class an
image as one class against the rest.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int8
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_validate
from sklearn.svm import LinearSVC

from mlip_jax.core.cores import cores
from mlip_jax.core.errors import UserError
from mlip_jax.core.progress import track
from mlip_jax.evaluations import average_precision, classifiers
from mlip_jax.evaluations.classifiers import named, on_one_thread
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.evaluations.sets import Sets

_FAMILY = "svm"
_COSTS = (0.01, 0.1, 1.0, 10.0)
_DEFAULT_COST = 1.0  # for classes with too few images for the folds
_FOLDS = 3
_ITERATIONS = 2000
_LARGE = 20_000_000  # numbers to learn from, over all classes; below, processes start too slowly
_EXTREMES = 3  # classes that a note names as the best and the worst


class Fits(NamedTuple):
    """The SVMs of some classes."""

    scores: Float[np.ndarray, "images classes"]  # of the images to test on
    costs: Float[np.ndarray, " classes"]  # C
    unconverged: int  # fits, those of the cross-validation among them


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a dataset without labels."""
    classifiers.check(sets, spec, _FAMILY, multi_label=True)


def score(sets: Sets, spec: str) -> Outcome | None:
    """Mean average precision of one SVM a class, trained on a dataset's training part.

    Returns:
      None for "validation" without labels.

    Raises:
      UserError: for a dataset without labels, a label that is no class, or no class with images
        both to train and to test on.
      RunError: for NaN or infinity among the features.
    """
    parts = classifiers.open_parts(sets, spec, _FAMILY, multi_label=True)
    if parts is None:
        return None
    train, test, origin = parts
    train_targets, test_targets = train.targets, test.targets
    usable = (train_targets == 1).any(axis=0) & (train_targets != 1).any(axis=0)
    usable &= (test_targets == 1).any(axis=0)
    usable_classes = np.flatnonzero(usable)
    if not usable_classes.size:
        raise UserError(
            f"config.evaluation.{_FAMILY}: the dataset {spec!r} has no class that some training "
            "images show, others not, and some test images show"
        )
    train_features, test_features = parts.features()
    fits = fit(
        train_features, train_targets[:, usable_classes], test_features, progress=sets.progress
    )
    class_means = average_precision.mean_over_classes(test_targets[:, usable_classes], fits.scores)
    names = test.source.class_names
    note = _note(
        [names[index] for index in usable_classes], class_means.per_class, fits, len(names)
    )
    if (train_targets == 0).any() or (test_targets == 0).any():
        note += " Difficult images are negatives in training and left out in test."
    if usable_classes.size < len(names):
        left_out = [names[index] for index in np.flatnonzero(~usable)]
        note += (
            f" {len(left_out):,} classes without an image to train or to test on are left out: "
            f"{named(left_out)}."
        )
    figures = {
        "mean_average_precision": class_means.step_sum,
        "mean_average_precision_11_point": class_means.eleven_point,
    }
    chance = (class_means.chance, class_means.eleven_point_chance)
    protocols = ("linear SVM, step-sum AP", "linear SVM, 11-point AP")
    return Outcome(
        test.name,
        figures,
        dict(zip(figures, chance, strict=True)),
        dict.fromkeys(figures, len(test)),
        dict(zip(figures, protocols, strict=True)),
        f"{note} {origin}",
    )


def fit(
    train: Float[np.ndarray, "training width"],
    targets: Int8[np.ndarray, "training classes"],
    test: Float[np.ndarray, "images width"],
    *,
    parallel: bool | None = None,
    progress: bool = False,
) -> Fits:
    """Trains an SVM a class, with C chosen by cross-validation, and scores images.

    Args:
      train: L2-normalised features.
      targets: 1 where an image shows a class, else a negative: -1, and 0 for one that is too
        difficult to count in a test. Every class needs both.
      test: L2-normalised features.
      parallel: whether to use a process a core; None: where the work is large.
      progress: whether to draw a bar.
    """
    classes = targets.shape[1]
    if parallel is None:
        parallel = train.size * classes > _LARGE
    # Processes, as threads would share liblinear's random numbers.
    work = Parallel(n_jobs=cores() if parallel else 1, return_as="generator")
    fits = work(delayed(_fit_class)(train, class_targets == 1, test) for class_targets in targets.T)
    drawn = track(fits, "Training SVMs", classes, shown=progress)
    scores, costs, unconverged = zip(*drawn, strict=True)
    return Fits(np.stack(scores, axis=1), np.array(costs), sum(unconverged))


@on_one_thread
def _fit_class(
    train: Float[np.ndarray, "training width"],
    positive: Bool[np.ndarray, " training"],
    test: Float[np.ndarray, "images width"],
) -> tuple[Float[np.ndarray, " images"], float, int]:
    """Scores of the test images, the chosen C, and the number of fits that did not converge."""
    targets = np.where(positive, 1, -1)
    models, means = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if min(positive.sum(), (~positive).sum()) >= _FOLDS:
            for cost in _COSTS:
                folds = cross_validate(
                    _svm(cost),
                    train,
                    targets,
                    cv=_FOLDS,
                    scoring="average_precision",
                    return_estimator=True,
                )
                models.extend(folds["estimator"])
                means.append(folds["test_score"].mean())
        cost = _COSTS[int(np.argmax(means))] if means else _DEFAULT_COST
        models.append(_svm(cost).fit(train, targets))
    unconverged = sum(int(model.n_iter_ >= _ITERATIONS) for model in models)
    return models[-1].decision_function(test), cost, unconverged


def _svm(cost: float) -> LinearSVC:
    return LinearSVC(
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        C=cost,
        class_weight={1: 2, -1: 1},
        intercept_scaling=1.0,
        tol=1e-4,
        max_iter=_ITERATIONS,
        random_state=0,
    )


def _note(
    names: Sequence[str], precisions: Float[np.ndarray, " classes"], fits: Fits, total: int
) -> str:
    """The protocol in full, what was chosen, and the classes at both ends."""
    order = sorted(range(len(names)), key=lambda index: -precisions[index])
    worded = [f"{names[index]} {100 * precisions[index]:.1f} %" for index in order]
    if len(worded) > 2 * _EXTREMES:
        best, worst = ", ".join(worded[:_EXTREMES]), ", ".join(worded[-_EXTREMES:])
        extremes = f"the best: {best}; the worst: {worst}"
    else:
        extremes = ", ".join(worded)
    chosen = ", ".join(f"{cost:g} ({count})" for cost, count in sorted(Counter(fits.costs).items()))
    note = (
        f"{len(names):,} of {total:,} classes, a linear SVM each on L2-normalised features; C by "
        f"{_FOLDS}-fold cross-validation on average precision, {_DEFAULT_COST:g} for classes with "
        f"fewer than {_FOLDS} training images, was (in how many classes): {chosen}. Average "
        f"precision: {extremes}."
    )
    if fits.unconverged:
        note += f" {fits.unconverged:,} fits did not converge in {_ITERATIONS:,} iterations."
    return note


FAMILY = Family(
    score,
    check,
    needs_joint_space=False,
    wants=("labels and a training split with labels", "folder:DIR"),
)
