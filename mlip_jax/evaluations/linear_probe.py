"""The linear probe: one linear classifier on frozen features, trained in one of three ways.

"lbfgs" is logistic regression with a swept L2 penalty, as in CLIP (section A.3); "ridge" is least
squares on one-hot targets, in closed form; "sgd" is the protocol of many papers (`sgd_probe`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from mlip_jax.core.errors import UserError
from mlip_jax.core.progress import track
from mlip_jax.evaluations import classifiers
from mlip_jax.evaluations.classifiers import Linear, Ridge, on_one_thread, place_in_class, ranks
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.evaluations.sets import Sets
from mlip_jax.evaluations.sgd_probe import sgd
from mlip_jax.evaluations.zero_shot import accuracies

_FAMILY = "linear_probe"
_WORDS = {"lbfgs": "L-BFGS", "ridge": "ridge", "sgd": "SGD"}

# From the strongest regularisation, so that of several that are as good the strongest is taken.
_EXPONENTS = tuple(range(-5, 3))  # of C, to base 10; halves around the best follow
_STRENGTHS = tuple(10.0 ** (half / 2) for half in range(4, -13, -1))
_DEFAULT_COST, _DEFAULT_STRENGTH = 0.1, 0.1  # where no image can be held out
_ITERATIONS = 1000


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a dataset without labels or with several classes an image."""
    classifiers.check(sets, spec, _FAMILY)


def score(sets: Sets, spec: str) -> Outcome | None:
    """Trains config.evaluation.probe.method's classifier on a dataset's training part, tests it.

    Returns:
      None for "validation" without one label an image.

    Raises:
      UserError: for a dataset without labels or with several classes an image, a label that is no
        class, or a training part with fewer than two classes.
      RunError: for NaN or infinity among the features.
    """
    parts = classifiers.open_parts(sets, spec, _FAMILY)
    if parts is None:
        return None
    train, test, origin = parts
    if len(np.unique(train.labels)) < 2:
        raise UserError(
            f"config.evaluation.{_FAMILY}: the dataset {spec!r} has training images of one "
            "class alone"
        )
    classes = len(test.source.class_names)
    method = sets.config.evaluation.probe.method
    train_features, test_features = parts.features()
    class_ranks, note = probe(
        method,
        train_features,
        train.labels,
        test_features,
        test.labels,
        classes,
        sets.config.seed,
        sets.progress,
    )
    figures = accuracies(class_ranks, test.labels, classes)
    return Outcome(
        test.name,
        figures,
        chance(train.labels, test.labels, classes),
        dict.fromkeys(figures, len(test)),
        dict.fromkeys(figures, f"linear probe, {_WORDS[method]}"),
        f"{classes:,} classes; {note}; ties count against the model. {origin}"
        f"{classifiers.untrained(train, test)}",
    )


def chance(
    train: Int[np.ndarray, " training"], test: Int[np.ndarray, " images"], classes: int
) -> dict[str, float]:
    """What the classes most frequent in training give in test, whatever the image."""
    frequent = np.argsort(-np.bincount(train, minlength=classes), kind="stable")
    values = {"top1": float(np.mean(test == frequent[0]))}
    if classes > 5:
        values["top5"] = float(np.isin(test, frequent[:5]).mean())
    present = np.unique(test)
    values["mean_per_class"] = float(np.mean(present == frequent[0]))
    return values


@on_one_thread
def probe(
    method: str,
    train: Float[np.ndarray, "training width"],
    train_labels: Int[np.ndarray, " training"],
    test: Float[np.ndarray, "images width"],
    test_labels: Int[np.ndarray, " images"],
    classes: int,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Int[np.ndarray, " images"], str]:
    """Trains a linear classifier and ranks the classes for other images.

    Args:
      method: one of config.PROBES.
      train: L2-normalised features.
      train_labels: their classes, two or more.
      test: L2-normalised features.
      test_labels: their classes.
      classes: how many there are.
      seed: of the order of the images in "sgd".
      progress: whether to draw bars.

    Returns:
      The place of each test image's own class, from 1, and how the classifier was trained, as a
      part of a sentence.
    """
    if method == "sgd":
        linear, note = sgd(train, train_labels, classes, seed, progress)
        return ranks(linear, test, test_labels), f"L2-normalised features, {note}"
    train, test = standardise(train, test)
    fit = lbfgs if method == "lbfgs" else ridge
    linear, note = fit(train, train_labels, classes, progress)
    return ranks(linear, test, test_labels), (
        f"features L2-normalised, then standardised by the training images; {note}"
    )


def standardise(
    train: Float[np.ndarray, "training width"], test: Float[np.ndarray, "images width"]
) -> tuple[Float[np.ndarray, "training width"], Float[np.ndarray, "images width"]]:
    """Both with the mean 0 and the deviation 1 that every feature has in training.

    Not in CLIP's protocol: it lets L-BFGS converge in fewer steps, and one range of penalties
    serves every encoder.
    """
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1)
    return (train - mean) / deviation, (test - mean) / deviation


def held_out(labels: Int[np.ndarray, " images"]) -> Bool[np.ndarray, " images"]:
    """Every fifth image of a class, from the second on: what regularisation is chosen on."""
    return place_in_class(labels) % 5 == 1


def lbfgs(
    features: Float[np.ndarray, "images width"],
    labels: Int[np.ndarray, " images"],
    classes: int,
    progress: bool = False,
) -> tuple[Linear, str]:
    """Multinomial logistic regression by L-BFGS; C is chosen on `held_out`, then all train.

    Args:
      features: standardised.
      labels: two classes or more.
      classes: how many there are.
      progress: whether to draw a bar.

    Returns:
      The classifier, and what was chosen, as a part of a sentence.
    """
    is_held_out = held_out(labels)
    if is_held_out.any():
        cost = 10.0 ** _best_exponent(features, labels, classes, is_held_out, progress)
        note = f"C = {cost:.3g}, chosen on every fifth training image of a class"
    else:
        cost, note = _DEFAULT_COST, f"C = {_DEFAULT_COST}, as no class has two training images"
    model = LogisticRegression(C=cost, max_iter=_ITERATIONS)
    linear = _fit(model, features, labels, classes)
    if model.n_iter_.max() >= _ITERATIONS:
        note += f", not converged after {_ITERATIONS:,} iterations"
    return linear, note


def ridge(
    features: Float[np.ndarray, "images width"],
    labels: Int[np.ndarray, " images"],
    classes: int,
    progress: bool = False,
) -> tuple[Linear, str]:
    """Ridge regression on one-hot targets; arguments and results as in `lbfgs`."""
    del progress  # it takes seconds
    is_held_out = held_out(labels)
    if is_held_out.any():
        part = Ridge(features[~is_held_out], labels[~is_held_out], classes)
        correct = [
            _correct(part.solve(strength), features[is_held_out], labels[is_held_out])
            for strength in _STRENGTHS
        ]
        strength = _STRENGTHS[int(np.argmax(correct))]
        chosen = "chosen on every fifth training image of a class"
    else:
        strength, chosen = _DEFAULT_STRENGTH, "as no class has two training images"
    note = f"a penalty of {strength:.3g} times the mean eigenvalue, {chosen}"
    return Ridge(features, labels, classes).solve(strength), note


def _best_exponent(
    features: Float[np.ndarray, "images width"],
    labels: Int[np.ndarray, " images"],
    classes: int,
    is_held_out: Bool[np.ndarray, " images"],
    progress: bool,
) -> float:
    """log10 of the C that gets most of the held-out images right."""
    model = LogisticRegression(max_iter=_ITERATIONS, warm_start=True)

    def sweep(exponents: Sequence[float]) -> dict[float, int]:
        correct = {}
        for exponent in track(exponents, "Choosing C", shown=progress):
            model.set_params(C=10.0**exponent)
            linear = _fit(model, features[~is_held_out], labels[~is_held_out], classes)
            correct[exponent] = _correct(linear, features[is_held_out], labels[is_held_out])
        return correct

    correct = sweep(_EXPONENTS)
    best = max(correct, key=correct.__getitem__)
    correct |= sweep((best - 0.5, best + 0.5))
    return max(sorted(correct), key=correct.__getitem__)


def _fit(
    model: LogisticRegression,
    features: Float[np.ndarray, "images width"],
    labels: Int[np.ndarray, " images"],
    classes: int,
) -> Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    coefficients, intercept = model.coef_, model.intercept_
    if len(coefficients) == 1:  # of two classes, scikit-learn keeps the second alone
        coefficients = np.concatenate([-coefficients, coefficients])
        intercept = np.concatenate([-intercept, intercept])
    weights, bias = np.zeros((features.shape[1], classes)), np.full(classes, -np.inf)
    weights[:, model.classes_], bias[model.classes_] = coefficients.T, intercept
    return Linear(weights, bias)


def _correct(
    linear: Linear,
    features: Float[np.ndarray, "images width"],
    labels: Int[np.ndarray, " images"],
) -> int:
    return int((ranks(linear, features, labels) == 1).sum())


FAMILY = Family(
    score,
    check,
    needs_joint_space=False,
    wants=("labels and a training split with labels", "folder:DIR"),
)
