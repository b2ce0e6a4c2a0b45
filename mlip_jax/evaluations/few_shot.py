"""Few-shot classification: ridge regression on the features of a few images of each class.

How many images and how they are drawn follows CoOp (Zhou et al., 2022, section 4.1); the classifier
is ours: it has a closed form, so that many draws are cheap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from mlip_jax.core.errors import UserError
from mlip_jax.core.progress import track
from mlip_jax.evaluations import classifiers
from mlip_jax.evaluations.classifiers import Parts, Ridge, on_one_thread, place_in_class, ranks
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.evaluations.sets import Sets

_FAMILY = "few_shot"
# From the strongest, so that of several that are as good the strongest is taken.
_STRENGTHS = tuple(10.0 ** (half / 2) for half in range(6, -7, -1))
_DEFAULT_STRENGTH = 0.1  # where no class has another image to choose on
_CHOSEN_ON = 4  # other images a class at most, as in CoOp


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a dataset without labels or with several classes an image."""
    classifiers.check(sets, spec, _FAMILY)


def score(sets: Sets, spec: str) -> Outcome | None:
    """Accuracy after config.evaluation.probe.shots images a class, the mean over its draws.

    Returns:
      None for "validation" without one label an image.

    Raises:
      UserError: for a dataset without labels or with several classes an image, a label that is no
        class, or a class with fewer training images than any of the shots.
      RunError: for NaN or infinity among the features.
    """
    parts = classifiers.open_parts(sets, spec, _FAMILY)
    if parts is None:
        return None
    train, test, origin = parts
    classes = len(test.source.class_names)
    options = sets.config.evaluation.probe
    shots, left_out = _possible(parts, spec, options.shots)
    train_features, test_features = parts.features()
    accuracy_by_shots = accuracies(
        train_features,
        train.labels,
        test_features,
        test.labels,
        classes,
        shots,
        options.draws,
        sets.config.seed,
        sets.progress,
    )
    figures = {f"top1@{count}": float(accuracy_by_shots[count].mean()) for count in shots}
    # A guess among the classes that were seen.
    seen_classes = np.unique(train.labels)
    chance = float(np.isin(test.labels, seen_classes).mean() / len(seen_classes))
    spread = ", ".join(
        f"{100 * accuracy_by_shots[count].std():.2f} % at {count}" for count in shots
    )
    return Outcome(
        test.name,
        figures,
        dict.fromkeys(figures, chance),
        dict.fromkeys(figures, len(test)),
        {f"top1@{count}": f"few-shot, {count} a class, ridge" for count in shots},
        f"{classes:,} classes; ridge regression on L2-normalised features; training images a "
        f"class: {_listed(shots)}, the smaller draws part of the larger; the mean of "
        f"{options.draws} draws, standard deviation: {spread}; the penalty is chosen on as many "
        f"other training images a class, {_CHOSEN_ON} at most, and is {_DEFAULT_STRENGTH} times "
        "the mean eigenvalue where there are none; ties count against the model."
        f"{left_out} {origin}"
        f"{classifiers.untrained(train, test)}",
    )


@on_one_thread
def accuracies(
    train_features: Float[np.ndarray, "training width"],
    train_labels: Int[np.ndarray, " training"],
    test_features: Float[np.ndarray, "images width"],
    test_labels: Int[np.ndarray, " images"],
    classes: int,
    shots: Sequence[int],
    draws: int,
    seed: int = 0,
    progress: bool = False,
) -> dict[int, Float[np.ndarray, " draws"]]:
    """Top-1 accuracy in [0, 1] of each draw, by the number of training images a class.

    Args:
      train_features: L2-normalised; draws are made from these.
      train_labels: their classes.
      test_features: L2-normalised.
      test_labels: their classes.
      classes: how many there are.
      shots: numbers of images a class; a class with fewer gives all that it has.
      draws: how many times they are drawn.
      seed: of the draws; draw i is the same however many there are.
      progress: whether to draw a bar.
    """
    accuracy_by_shots = {count: np.empty(draws) for count in shots}
    for draw in track(range(draws), "Few-shot draws", shown=progress):
        places = _shuffled_places(train_labels, seed, draw)
        for count in shots:
            chosen = places < count
            held_out = (places >= count) & (places < count + min(count, _CHOSEN_ON))
            ridge = Ridge(train_features[chosen], train_labels[chosen], classes)
            strength = _DEFAULT_STRENGTH
            if held_out.any():
                correct = [
                    (
                        ranks(ridge.solve(each), train_features[held_out], train_labels[held_out])
                        == 1
                    )
                    for each in _STRENGTHS
                ]
                strength = _STRENGTHS[int(np.argmax(np.sum(correct, axis=1)))]
            right = ranks(ridge.solve(strength), test_features, test_labels) == 1
            accuracy_by_shots[count][draw] = right.mean()
    return accuracy_by_shots


def _shuffled_places(
    labels: Int[np.ndarray, " images"], seed: int, draw: int
) -> Int[np.ndarray, " images"]:
    """Each image's place, from 0, in a random order of its class."""
    order = np.random.default_rng((seed, draw)).permutation(len(labels))
    places = np.empty(len(labels), np.int64)
    places[order] = place_in_class(labels[order])
    return places


def _possible(parts: Parts, spec: str, shots: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """The numbers that every class with a training image can give; a sentence on the others."""
    labels, counts = np.unique(parts.train.labels, return_counts=True)
    fewest = int(np.min(counts))
    name = parts.train.source.class_names[labels[np.argmin(counts)]]
    possible = tuple(sorted({count for count in shots if count <= fewest}))
    if not possible:
        raise UserError(
            f"config.evaluation.{_FAMILY}: the class {name!r} of the dataset {spec!r} has {fewest} "
            f"training images; config.evaluation.probe.shots={tuple(shots)} needs more"
        )
    missing = sorted({count for count in shots if count > fewest})
    if not missing:
        return possible, ""
    return possible, (
        f" Left out, as the class {name!r} has only {fewest} to train on: {_listed(missing)}."
    )


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


FAMILY = Family(
    score,
    check,
    needs_joint_space=False,
    wants=("labels and a training split with labels", "folder:DIR"),
)
