"""Linear probes and few-shot classification on frozen features."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as ReferenceRidge

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.schema import PROBES, default
from mlip_jax.evaluations import classifiers, few_shot, linear_probe, sgd_probe
from mlip_jax.evaluations.scores import on_grid
from mlip_jax.evaluations.sets import EmbeddedSet


class FakeSource:
    """A dataset that is known by its class names alone."""

    notes = ()

    def __init__(self, class_names):
        self.class_names = tuple(class_names)

    def name_of(self, index):
        return f"image-{index}"


class FakeSets:
    """Datasets of which one is embedded already."""

    progress = False

    def __init__(self, train, test, **options):
        self.config = default()
        self.config.evaluation.probe.update(options)
        self._train, self._test = train, test

    def source(self, spec):
        return self._test.source

    def train_and_test(self, spec):
        return self._train, self._test, f"trained on {len(self._train)} images"


def embedded(labels, class_names, seed=0, features=None, source=None):
    labels = np.asarray(labels)
    return EmbeddedSet(
        source=source or FakeSource(class_names),
        name="birds",
        embeddings=None,
        features=clusters(labels, seed) if features is None else features,
        indices=np.arange(len(labels)),
        captions=((),) * len(labels),
        labels=labels,
        equal=np.arange(len(labels)),
        unreadable=(),
    )


def clusters(labels, seed=0, noise=0.1):
    """Features of eight numbers, near each other within a class."""
    centres = np.random.default_rng(9).normal(size=(20, 8))
    rng = np.random.default_rng(seed)
    rows = centres[labels] + noise * rng.normal(size=(len(labels), 8))
    return rows.astype(np.float32)


def random_case(images, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    labels[:classes] = np.arange(classes)
    return on_grid(clusters(labels, seed, noise=2.0), "features"), labels


NAMES = ("crow", "jay", "tit")
TRAIN, TEST = np.arange(30) % 3, np.arange(12) % 3


@pytest.mark.parametrize("method", PROBES)
def test_every_method_tells_apart_what_can_be(method):
    sets = FakeSets(embedded(TRAIN, NAMES), embedded(TEST, NAMES, seed=1), method=method)
    outcome = linear_probe.score(sets, "folder:birds")
    assert outcome.figures == {"top1": 1.0, "mean_per_class": 1.0}
    assert outcome.figures.keys() == outcome.chance.keys() == outcome.protocols.keys()
    assert outcome.examples == {"top1": 12, "mean_per_class": 12}
    words = {"lbfgs": "L-BFGS", "ridge": "ridge", "sgd": "SGD"}[method]
    assert outcome.protocols["top1"] == f"linear probe, {words}"
    assert "3 classes" in outcome.note and "Trained on 30 images." in outcome.note


@pytest.mark.parametrize("classes", [2, 5])
@classifiers.on_one_thread
def test_logistic_regression_equals_scikit_learns(classes):
    features, labels = random_case(60, classes)
    linear, note = linear_probe.lbfgs(features, labels, classes)
    cost = float(note.split("C = ")[1].split(",")[0])
    reference = LogisticRegression(C=cost, max_iter=1000).fit(features, labels)
    scores = features @ linear.weights + linear.bias
    np.testing.assert_array_equal(scores.argmax(axis=1), reference.predict(features))


@pytest.mark.parametrize("images", [6, 40])  # fewer and more than features
def test_ridge_equals_scikit_learns(images):
    features, labels = random_case(images)
    linear = classifiers.Ridge(features, labels, 4).solve(0.1)
    centred = features - features.mean(axis=0)
    punishment = 0.1 * (centred**2).sum() / min(features.shape)
    reference = ReferenceRidge(alpha=punishment, solver="svd").fit(features, np.eye(4)[labels])
    np.testing.assert_allclose(linear.weights, reference.coef_.T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(linear.bias, reference.intercept_, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("images", [40, 300])  # a single batch, and a last one that is smaller
def test_sgd_equals_plain_steps(images, monkeypatch):
    monkeypatch.setattr(sgd_probe, "_EPOCHS", 9)  # with more, float32 goes its own way
    monkeypatch.setattr(sgd_probe, "_DROPS", (3, 6))
    features, labels = random_case(images)
    linear, _ = sgd_probe.sgd(features, labels, 4, seed=3)
    rng = np.random.default_rng(3)
    inputs = np.concatenate([features, np.ones((images, 1))], axis=1)
    weights = speed = np.zeros((9, 4))
    for epoch in range(9):
        order = rng.permutation(images)
        for rows in (order[start : start + 256] for start in range(0, images, 256)):
            odds = np.exp(inputs[rows] @ weights)
            error = odds / odds.sum(axis=1, keepdims=True) - np.eye(4)[labels[rows]]
            speed = 0.9 * speed + inputs[rows].T @ error / len(rows)
            weights = weights - 30 * 0.1 ** ((epoch >= 3) + (epoch >= 6)) * speed
    np.testing.assert_allclose(linear.weights, weights[:-1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(linear.bias, weights[-1], rtol=1e-3, atol=1e-3)


def test_sgd_gives_the_same_bits_each_time(monkeypatch):
    monkeypatch.setattr(sgd_probe, "_EPOCHS", 9)
    features, labels = random_case(300)
    first, *others = (sgd_probe.sgd(features, labels, 4)[0].weights for _ in range(20))
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("method", PROBES)
def test_a_class_without_training_images_is_always_wrong(method):
    names = [f"bird {number}" for number in range(7)]
    train, test = embedded(np.arange(30) % 6, names), embedded(np.arange(14) % 7, names, seed=1)
    outcome = linear_probe.score(FakeSets(train, test, method=method), "folder:birds")
    assert outcome.figures == pytest.approx(
        {"top1": 12 / 14, "top5": 12 / 14, "mean_per_class": 6 / 7}
    )
    assert "1 classes have no training image and are always wrong: bird 6." in outcome.note


def test_chance_is_the_most_frequent_class():
    train = np.array([2, 2, 2, 0, 1, 3, 4, 5, 5])
    chance = linear_probe.chance(train, np.array([2, 2, 0, 6, 4]), classes=7)
    assert chance == {"top1": 0.4, "top5": 0.6, "mean_per_class": 0.25}


def test_regularisation_is_chosen_on_a_part_of_every_class():
    labels = np.array([0] * 11 + [1] * 2 + [2])
    held_out = linear_probe.held_out(np.random.default_rng(0).permutation(labels))
    assert held_out.sum() == 3
    held_out = linear_probe.held_out(labels)
    assert np.flatnonzero(held_out).tolist() == [1, 6, 12]


@pytest.mark.parametrize("method", ["lbfgs", "ridge"])
def test_one_image_a_class_leaves_nothing_to_choose_on(method):
    sets = FakeSets(embedded([0, 1, 2], NAMES), embedded(TEST, NAMES), method=method)
    assert "no class has two training images" in linear_probe.score(sets, "folder:birds").note


@classifiers.on_one_thread
def test_a_fit_that_does_not_converge_is_noted_and_warns_nobody(monkeypatch):
    monkeypatch.setattr(linear_probe, "_ITERATIONS", 1)
    features, labels = random_case(60)
    _, note = linear_probe.lbfgs(features, labels, 4)
    assert "not converged after 1 iterations" in note


def test_equal_scores_count_against_the_class():
    linear = classifiers.Linear(np.zeros((2, 3)), np.array([0.0, 0.0, -np.inf]))
    ranks = classifiers.ranks(linear, np.ones((3, 2)), np.array([0, 1, 2]), chunk=2)
    assert ranks.tolist() == [2, 2, 3]


def test_few_shot_gives_a_figure_for_each_number_of_images():
    sets = FakeSets(embedded(TRAIN, NAMES), embedded(TEST, NAMES, seed=1), draws=2)
    outcome = few_shot.score(sets, "folder:birds")
    assert outcome.figures == {f"top1@{count}": 1.0 for count in (1, 2, 4, 8)}
    assert set(outcome.chance.values()) == {1 / 3}
    assert outcome.protocols["top1@4"] == "few-shot, 4 a class, ridge"
    assert "Left out, as the class 'crow' has only 10 to train on: 16." in outcome.note


def test_few_shot_draws_are_the_same_however_many_there_are():
    train, test = random_case(80), random_case(40, seed=1)
    many = few_shot.accuracies(*train, *test, 4, shots=(1, 2, 4), draws=3)
    few = few_shot.accuracies(*train, *test, 4, shots=(2,), draws=2)
    np.testing.assert_array_equal(few[2], many[2][:2])
    assert len(set(many[4])) > 1
    other = few_shot.accuracies(*train, *test, 4, shots=(1, 2, 4), draws=3, seed=1)
    assert any((other[count] != many[count]).any() for count in many)


def test_all_images_as_shots_are_ridge_regression_on_all():
    train, test = random_case(80), random_case(40, seed=1)
    accuracies = few_shot.accuracies(*train, *test, 4, shots=(80,), draws=2)
    linear = classifiers.Ridge(*train, 4).solve(0.1)
    assert set(accuracies[80]) == {np.mean(classifiers.ranks(linear, *test) == 1)}


@pytest.mark.parametrize("score", [linear_probe.score, few_shot.score])
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((TRAIN, ()), (TEST, ()), "the dataset 'folder:birds' has no class labels"),
        ((0 * TRAIN - 1, NAMES), (0 * TEST - 1, NAMES), "has no class labels"),
        ((0 * TRAIN - 1, NAMES), (TEST, NAMES), "has no image with a class to train on"),
        ((TRAIN, NAMES), (0 * TEST - 1, NAMES), "has no image with a class to test on"),
        ((TRAIN, NAMES), (TEST, NAMES[::-1]), "has other classes in its training split"),
        (
            (np.append(TRAIN, 3), NAMES),
            (TEST, NAMES),
            "image-30 has the label 3, but there are 3 classes, from 0 to 2",
        ),
    ],
)
def test_sets_that_cannot_be_learned(score, train, test, message):
    sets = FakeSets(embedded(*train), embedded(*test))
    with pytest.raises(UserError, match=message):
        score(sets, "folder:birds")


@pytest.mark.parametrize("family", [linear_probe, few_shot])
def test_several_classes_an_image_are_for_the_svm(family):
    source = FakeSource(NAMES)
    source.targets = lambda: np.ones((12, 3), np.int8)
    part = embedded(0 * TEST, NAMES, source=source)
    sets = FakeSets(part, part)
    with pytest.raises(UserError, match="name it in config.evaluation.svm instead"):
        family.score(sets, "voc:birds")
    with pytest.raises(UserError, match="name it in config.evaluation.svm instead"):
        family.check(sets, "voc:birds")
    assert family.score(sets, "validation") is None


@pytest.mark.parametrize("family", [linear_probe, few_shot])
def test_a_validation_set_without_labels_gives_nothing(family):
    none = FakeSets(embedded(0 * TRAIN - 1, NAMES), embedded(0 * TEST - 1, NAMES))
    assert family.score(none, "validation") is None
    assert family.score(FakeSets(embedded(TRAIN, ()), embedded(TEST, ())), "validation") is None


@pytest.mark.parametrize("family", [linear_probe, few_shot])
def test_damaged_features_are_an_error(family):
    train = embedded(TRAIN, NAMES)
    train.features[4, 2] = np.nan
    sets = FakeSets(train, embedded(TEST, NAMES))
    with pytest.raises(RunError, match="1 of 30 training features of birds .* index 4"):
        family.score(sets, "folder:birds")


def test_images_without_a_class_are_left_out_and_counted():
    train, test = embedded(np.append(TRAIN, -1), NAMES), embedded(np.append(TEST, [-1, -1]), NAMES)
    outcome = linear_probe.score(FakeSets(train, test), "folder:birds")
    assert outcome.examples["top1"] == 12
    assert "1 images to train on and 2 to test on have no class and are left out." in outcome.note


def test_a_probe_needs_two_classes():
    sets = FakeSets(embedded(0 * TRAIN, NAMES), embedded(TEST, NAMES))
    with pytest.raises(UserError, match="has training images of one class alone"):
        linear_probe.score(sets, "folder:birds")


def test_shots_that_no_draw_can_give():
    sets = FakeSets(embedded(TRAIN, NAMES), embedded(TEST, NAMES), shots=(16,))
    with pytest.raises(UserError, match=r"the class 'crow' .* has 10 training images; .*\(16,\)"):
        few_shot.score(sets, "folder:birds")


def test_features_that_are_all_equal_tell_nothing_apart():
    train = embedded(TRAIN, NAMES, features=np.ones((30, 8), np.float32))
    test = embedded(TEST, NAMES, features=np.ones((12, 8), np.float32))
    for method in PROBES:
        outcome = linear_probe.score(FakeSets(train, test, method=method), "folder:birds")
        assert outcome.figures["top1"] <= 1 / 3 + 1e-9
