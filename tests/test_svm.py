"""Average precision, and linear SVMs scored by it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.schema import default
from mlip_jax.evaluations import average_precision, svm
from mlip_jax.evaluations.scores import on_grid
from mlip_jax.evaluations.sets import EmbeddedSet

REFERENCE = Path(__file__).parent / "data" / "average_precision.npz"


class FakeSource:
    """A dataset that is known by its class names, and by its targets where it has several a row."""

    notes = ()

    def __init__(self, class_names, targets=None):
        self.class_names = tuple(class_names)
        if targets is not None:
            self.targets = lambda: targets

    def name_of(self, index):
        return f"image-{index}"


class FakeSets:
    """Datasets of which one is embedded already."""

    progress = False

    def __init__(self, train, test):
        self.config = default()
        self._train, self._test = train, test

    def source(self, spec):
        return self._test.source

    def train_and_test(self, spec):
        return self._train, self._test, "the halves of all images"


def embedded(features, class_names, targets=None, labels=None):
    return EmbeddedSet(
        source=FakeSource(class_names, targets),
        name="rooms",
        embeddings=None,
        features=features,
        indices=np.arange(len(features)),
        captions=((),) * len(features),
        labels=np.full(len(features), -1) if labels is None else labels,
        equal=np.arange(len(features)),
        unreadable=(),
    )


def several_classes(images, seed):
    """Features, and targets that they tell: a class is shown where its own number is high."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(images, 6)).astype(np.float32)
    noise = rng.normal(size=(images, 4))
    return features, np.where(features[:, :4] + 0.5 * noise > 0.7, 1, -1).astype(np.int8)


NAMES = ("bed", "chair", "lamp", "sofa")


def multi_label_sets(change=lambda train, test: None):
    parts = [several_classes(60, 0), several_classes(40, 1)]
    change(parts[0][1], parts[1][1])
    return FakeSets(*(embedded(features, NAMES, targets) for features, targets in parts))


def test_step_sum_equals_the_reference():
    case = np.load(REFERENCE)
    labels, scores = case["labels"], case["scores"]
    precisions = [average_precision.step_sum(labels[:, k], scores[:, k]) for k in range(5)]
    np.testing.assert_allclose(precisions, case["ap"], rtol=1e-6)


def test_eleven_point_by_hand():
    labels = np.array([1, -1, 1, -1, -1, 1, -1, -1, -1, 1])
    scores = -np.arange(10.0)
    # The best precision is 1 up to a recall of 1/4, 2/3 to 1/2, 1/2 to 3/4, then 4/10.
    expected = (3 * 1 + 3 * 2 / 3 + 2 * 1 / 2 + 3 * 4 / 10) / 11
    assert average_precision.eleven_point(labels, scores) == pytest.approx(expected)
    assert average_precision.eleven_point(labels, -scores) < expected


@pytest.mark.parametrize("measure", ["step_sum", "eleven_point"])
def test_equal_scores_are_one_step(measure):
    measure = getattr(average_precision, measure)
    labels = np.array([1, -1, -1, 1, -1])
    assert measure(labels, np.zeros(5)) == pytest.approx(2 / 5)
    assert measure(labels[::-1], np.zeros(5)) == pytest.approx(2 / 5)


@pytest.mark.parametrize(("positives", "total"), [(1, 1), (1, 6), (3, 6), (5, 6), (6, 6)])
def test_chance_is_the_mean_over_all_orders(positives, total):
    orders = [
        np.isin(np.arange(total), chosen)
        for chosen in itertools.combinations(range(total), positives)
    ]
    scores = -np.arange(float(total))
    exact = np.mean([average_precision.step_sum(order, scores) for order in orders])
    assert average_precision.expected(positives, total) == pytest.approx(exact)
    exact = np.mean([average_precision.eleven_point(order, scores) for order in orders])
    drawn = average_precision.expected_eleven_point(positives, total, 2000)
    assert drawn == pytest.approx(exact, abs=0.02)
    assert drawn == average_precision.expected_eleven_point.__wrapped__(positives, total, 2000)


def test_the_mean_is_over_classes_that_are_shown_and_without_difficult_images():
    targets = np.array([[1, -1, 0], [-1, -1, 1], [0, -1, -1], [1, -1, 1]], np.int8)
    scores = np.random.default_rng(0).normal(size=(4, 3))
    mean_precision = average_precision.mean_over_classes(targets, scores)
    assert mean_precision.classes.tolist() == [0, 2]
    class_precisions = [
        average_precision.step_sum(targets[rows, k], scores[rows, k])
        for k, rows in ((0, [0, 1, 3]), (2, [1, 2, 3]))
    ]
    np.testing.assert_allclose(mean_precision.per_class, class_precisions)
    assert mean_precision.step_sum == pytest.approx(np.mean(class_precisions))
    assert mean_precision.chance == pytest.approx(average_precision.expected(2, 3))


def test_rankings_that_have_no_average_precision():
    with pytest.raises(RunError, match="1 of 3 scores are NaN; the first is index 1"):
        average_precision.step_sum(np.array([1, -1, 1]), np.array([0, np.nan, 1]))
    with pytest.raises(UserError, match="at least one positive"):
        average_precision.eleven_point(np.array([-1, -1]), np.array([0.0, 1.0]))
    with pytest.raises(UserError, match="at least one positive"):
        average_precision.mean_over_classes(-np.ones((2, 2), np.int8), np.zeros((2, 2)))


def test_svms_equal_a_grid_search_of_scikit_learn():
    features, targets = several_classes(60, 0)
    train, test = on_grid(features, "rows"), on_grid(several_classes(40, 1)[0], "rows")
    fits = svm.fit(train, targets, test)
    for index in range(4):
        reference = GridSearchCV(
            LinearSVC(
                dual=True,
                class_weight={1: 2, -1: 1},
                intercept_scaling=1.0,
                tol=1e-4,
                max_iter=2000,
                random_state=0,
            ),
            {"C": [0.01, 0.1, 1.0, 10.0]},
            scoring="average_precision",
            cv=3,
        ).fit(train, targets[:, index])
        assert fits.costs[index] == reference.best_params_["C"]
        np.testing.assert_allclose(fits.scores[:, index], reference.decision_function(test))


def test_processes_change_no_figure():
    features, targets = several_classes(60, 0)
    train = on_grid(features, "rows")
    alone = svm.fit(train, targets, train, parallel=False)
    together = svm.fit(train, targets, train, parallel=True)
    np.testing.assert_array_equal(alone.scores, together.scores)
    np.testing.assert_array_equal(alone.costs, together.costs)


def test_several_classes_an_image():
    outcome = svm.score(multi_label_sets(), "voc:rooms")
    assert set(outcome.figures) == {"mean_average_precision", "mean_average_precision_11_point"}
    for key, value in outcome.figures.items():
        assert value > outcome.chance[key] + 0.2
        assert outcome.examples[key] == 40
    assert list(outcome.protocols.values()) == [
        "linear SVM, step-sum AP",
        "linear SVM, 11-point AP",
    ]
    assert all(name in outcome.note for name in NAMES)
    assert outcome.note.startswith("4 of 4 classes")


def test_difficult_images_are_negatives_in_training_and_left_out_in_test():
    def train_only(train, test):
        train[:5, 0] = 0

    def negatives(train, test):
        train[:5, 0] = -1

    def test_too(train, test):
        train[:5, 0] = 0
        test[:10, 0] = 0

    zeros, minus, both = (
        svm.score(multi_label_sets(change), "voc:rooms").figures
        for change in (train_only, negatives, test_too)
    )
    assert zeros == minus != both


def test_one_class_an_image_is_one_against_the_rest():
    labels = np.arange(24) % 4
    rng = np.random.default_rng(0)
    features = (np.eye(4)[labels] + 0.05 * rng.normal(size=(24, 4))).astype(np.float32)
    labels[-1] = -1
    part = embedded(features, NAMES, labels=labels)
    outcome = svm.score(FakeSets(part, part), "folder:rooms")
    assert outcome.figures["mean_average_precision"] == 1.0
    assert outcome.examples["mean_average_precision"] == 23
    assert "1 images to train on and 1 to test on have no class and are left out." in outcome.note


def test_classes_without_images_are_left_out_and_named():
    def change(train, test):
        train[:, 0] = -1
        test[:, 2] = -1

    outcome = svm.score(multi_label_sets(change), "voc:rooms")
    assert outcome.note.startswith("2 of 4 classes")
    assert "2 classes without an image to train or to test on are left out: bed, lamp." in (
        outcome.note
    )


def test_classes_with_too_few_images_for_the_folds():
    features, targets = several_classes(60, 0)
    targets[:, 0] = -1
    targets[[3, 30], 0] = 1
    assert svm.fit(on_grid(features, "rows"), targets, features).costs[0] == 1.0


def test_fits_that_do_not_converge_are_counted_and_warn_nobody(monkeypatch):
    monkeypatch.setattr(svm, "_ITERATIONS", 1)
    outcome = svm.score(multi_label_sets(), "voc:rooms")
    assert "52 fits did not converge in 1 iterations." in outcome.note  # 4 classes: 4 * 3 + 1 each


def test_sets_without_anything_to_learn():
    def nothing(train, test):
        train[:] = -1

    with pytest.raises(UserError, match="the dataset 'voc:rooms' has no class that some training"):
        svm.score(multi_label_sets(nothing), "voc:rooms")
    features = several_classes(10, 0)[0]
    bare = FakeSets(embedded(features, ()), embedded(features, ()))
    for find in (svm.score, svm.check):
        with pytest.raises(UserError, match="config.evaluation.svm: .* has no class labels"):
            find(bare, "voc:rooms")
    assert svm.score(bare, "validation") is None


def test_damaged_features_are_an_error():
    sets = multi_label_sets()
    _, test, _ = sets.train_and_test("voc:rooms")
    test.features[7] = np.inf
    with pytest.raises(RunError, match="1 of 40 test features of rooms .* index 7"):
        svm.score(sets, "voc:rooms")
