"""Calibration and corruptions: figures by hand."""

import numpy as np
import pytest
from test_evaluations import FakeModel, FakeSource

import mlip_jax
from mlip_jax.core import schema
from mlip_jax.evaluations import calibration, corruptions, retrieval
from mlip_jax.evaluations.sets import Sets
from mlip_jax.evaluations.suites import apply_suite, evaluate

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (32, 32, 3), np.uint8)


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    confidence = RNG.uniform(0.1, 1, 500)
    right = RNG.random(500) < confidence**2
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration.expected_error(confidence, right) == pytest.approx(expected)
    sure, always = np.ones(4), np.ones(4, bool)
    assert calibration.expected_error(sure, always) == 0
    assert calibration.expected_error(sure, ~always) == 1


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_a_corruption_grows_with_its_strength(name):
    corrupt, strengths = corruptions.CORRUPTIONS[name]
    # Smooth, as photographs are: noise has no detail to lose to a blur.
    image = np.asarray(corruptions.Image.fromarray(IMAGE).resize((224, 224)))
    distances = []
    for strength in strengths:
        changed = corrupt(image, strength)
        assert changed.shape == image.shape and changed.dtype == np.uint8
        np.testing.assert_array_equal(changed, corrupt(image, strength))
        distances.append(np.abs(changed.astype(int) - image).mean())
    assert distances[0] > 0 and distances[-1] > distances[0]
    assert distances == sorted(distances)


def test_the_strengths_are_the_published_ones():
    image = np.full((4, 4, 3), 100, np.uint8)
    image[0] = 210
    mean = image.mean(axis=(0, 1)) / 255
    expected = np.rint(255 * ((image / 255 - mean) * 0.3 + mean))
    np.testing.assert_array_equal(corruptions.contrast(image, 0.3), expected)
    np.testing.assert_array_equal(
        corruptions.brightness(np.full((2, 2, 3), 51, np.uint8), 0.2), np.full((2, 2, 3), 102)
    )
    large = np.repeat(np.repeat(RNG.integers(0, 256, (4, 4, 3), np.uint8), 8, 0), 8, 1)
    np.testing.assert_array_equal(corruptions.pixelate(large, 0.125), large)


def test_confidence_is_the_softmax_of_the_scaled_cosines():
    class Model(FakeModel):
        logit_scale = 20.0

    greys, classes = np.array([0, 40, 200, 250]), np.array([60, 190])
    source = FakeSource(
        [(grey, (), label) for grey, label in zip(greys, (0, 0, 1, 0), strict=True)],
        [f"class {grey}" for grey in classes],
    )
    config = schema.default()
    apply_suite(config, "calibration")
    results = evaluate(Model(), config, validation=source, progress=False)
    logits = 20 * np.cos((greys[:, None] - classes) / 255 * np.pi / 2)
    confidence = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).max(axis=1)
    key = "calibration/fake/"
    assert results.figures[f"{key}mean_confidence"] == pytest.approx(confidence.mean(), abs=1e-6)
    right = np.array([True, True, True, False])
    error = calibration.expected_error(confidence, right)
    assert results.figures[f"{key}expected_calibration_error"] == pytest.approx(error, abs=1e-6)


def test_a_model_is_scored_on_both(trained):
    model = mlip_jax.load(trained)
    config = model.config.copy_and_resolve_references()
    apply_suite(config, "calibration,corruptions")
    results = evaluate(model, config, progress=False)
    assert results.left_out["calibration"].endswith("calibration=folder:DIR")
    figures = {key.rpartition("/")[2]: value for key, value in results.figures.items()}
    wanted = {
        f"{name}_{way}_recall@1"
        for name in ("clean", "mean", *corruptions.CORRUPTIONS)
        for way in ("text_to_image", "image_to_text")
    }
    assert set(figures) == wanted
    mean = np.mean([figures[f"{name}_text_to_image_recall@1"] for name in corruptions.CORRUPTIONS])
    assert figures["mean_text_to_image_recall@1"] == pytest.approx(mean)


def test_all_corruptions_of_an_image_are_made_when_it_is_decoded():
    class Counted(FakeSource):
        read = ()

        def __getitem__(self, index):
            self.read += (index,)
            return super().__getitem__(index)

    greys = (10, 60, 120, 180, 240)
    source = Counted([(grey, (f"grey {grey}",), 0) for grey in greys])
    config = schema.default()
    config.evaluation.batch_size = 4
    sets = Sets(FakeModel(), config, source, progress=False)
    figures = corruptions.score(sets, "validation").figures
    assert sorted(source.read) == sorted([*range(5)] * 2)  # once more without
    for name in ("brightness", "contrast"):
        corrupt, strengths = corruptions.CORRUPTIONS[name]
        alone = [
            retrieval.score(
                sets.seen_by(corruptions.Corrupted(FakeModel(), corrupt, strength, {})),
                "validation",
            ).figures["text_to_image_recall@1"]
            for strength in (strengths[0], strengths[2], strengths[4])
        ]
        assert figures[f"{name}_text_to_image_recall@1"] == pytest.approx(np.mean(alone))
    assert figures["contrast_text_to_image_recall@1"] > figures["brightness_text_to_image_recall@1"]
