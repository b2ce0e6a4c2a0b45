"""Guidance of token merging: every way by itself, and how each is measured."""

import io
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_models import encode

from mlip_jax.core import schema
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.regions.compositions import Compositions
from mlip_jax.data.sets.opening import open_source
from mlip_jax.evaluations import guidance as measured
from mlip_jax.evaluations.sets import Sets
from mlip_jax.evaluations.suites import apply_suite
from mlip_jax.models import guidance, merging

SIDE, PATCH = 32, 8
GRID = SIDE // PATCH


def drawing(row, column, color=(200, 30, 30)):
    """White, but for one patch, whose pixels are striped in two colours."""
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    patch = pixels[PATCH * row :, PATCH * column :][:PATCH, :PATCH]
    patch[:], patch[::2] = color, (0, 0, 0)
    return pixels


def drawn(rows):
    """Where the patches of `drawing` lie, [images, patches]."""
    return np.eye(GRID * GRID, dtype=bool)[[GRID * row + column for row, column in rows]]


PLACES = [(1, 1), (2, 1), (1, 2), (2, 2)]


def before(pixels, seed=0):
    rng = np.random.default_rng(seed)
    grid = len(pixels), GRID, GRID
    normal = jnp.asarray(rng.normal(size=(*grid, 6)), jnp.float32)
    patches = guidance.grid_of(jnp.asarray(pixels, jnp.float32) / 255, PATCH)
    return guidance.Before(patches, normal, jnp.flip(normal, axis=-1) + 1)


@pytest.mark.parametrize("name", ["contrast", "edges", "border"])
def test_pixels_find_what_is_drawn(name):
    scores = guidance.GUIDES[name].before(before(np.stack([drawing(*place) for place in PLACES])))
    np.testing.assert_array_equal(measured.roc_area(np.asarray(scores), drawn(PLACES)), 1.0)


def test_the_border_finds_what_is_of_one_colour():
    pixels = np.full((1, SIDE, SIDE, 3), 255, np.uint8)
    pixels[0, PATCH : 2 * PATCH, PATCH : 3 * PATCH] = 90
    scores, contrast = (
        np.asarray(guidance.GUIDES[name].before(before(pixels)))[0].reshape(GRID, GRID)
        for name in ("border", "contrast")
    )
    np.testing.assert_allclose(scores[1, 1:3], 165 / 255, rtol=1e-6)
    assert scores.sum() == scores[1, 1:3].sum()
    assert contrast.max() < 1e-6


def test_frequency_tokens_by_their_formulas():
    tokens = before(np.stack([drawing(1, 1)])).features
    features = tokens.reshape(1, GRID * GRID, -1)
    none = jnp.zeros(features.shape[:2])
    seen = guidance.Seen(none, none, features, {})
    f = np.asarray(features, np.float64)
    mean = f.mean(axis=1, keepdims=True)
    cosine = (f * mean).sum(-1) / np.linalg.norm(f, axis=-1) / np.linalg.norm(mean, axis=-1)
    exponentials = np.exp(cosine / 0.1)
    expected = {
        "frequency": exponentials / exponentials.sum(),
        "distance": -cosine,
        "norm": np.linalg.norm(f, axis=-1),
        "projection": (f * mean).sum(-1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(guidance.scores_within(name, seen), value, rtol=1e-4)
    spectrum = np.fft.rfft2(np.asarray(tokens, np.float64), axes=(1, 2))
    spectrum[:, 1:], spectrum[:, :, 1:] = 0, 0  # of a grid of 4, the mean alone is low
    smooth = np.fft.irfft2(spectrum, s=(GRID, GRID), axes=(1, 2))
    high = np.linalg.norm(np.asarray(tokens) - smooth, axis=-1).reshape(1, -1)
    actual = guidance.scores_before(guidance.GUIDES, before(np.stack([drawing(1, 1)])))
    np.testing.assert_allclose(actual["high_frequency"], high, rtol=1e-4)
    assert actual.keys() | expected.keys() | {"spatial", "received"} == guidance.GUIDES.keys()


def test_lots_are_drawn_by_the_image_not_by_its_place():
    pixels = np.stack([drawing(*place) for place in PLACES])
    scores, others = (
        np.asarray(guidance.GUIDES["random"].before(before(order)))
        for order in (pixels, pixels[::-1][:3])
    )
    np.testing.assert_array_equal(scores[::-1][:3], others)
    assert len(np.unique(scores)) == scores.size


def test_two_ways_together_and_what_both_means():
    assert guidance.parts("none") == ()
    assert guidance.parts("both") == guidance.parts("frequency+spatial")
    views = encode(**{"merging.guidance": "contrast+received"})
    guides = {name: jnp.asarray(scores) for name, scores in views.guides.items()}
    expected = merging.importance(guides["received"], guides["contrast"], 0.5)
    np.testing.assert_allclose(views.importance, expected, atol=1e-6)
    np.testing.assert_array_equal(guides["contrast+received"], views.importance)
    both = merging.importance(guides["spatial"], guides["frequency"], 0.5)
    np.testing.assert_allclose(guides["both"], both, atol=1e-6)
    assert guides.keys() == guidance.GUIDES.keys() | {"both", "contrast+received"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("contrst", "did you mean 'contrast'"),
        ("contrast+none", "expected one of none, both, spatial"),
        ("norm+edges+border", "or two of the ways as ONE+OTHER"),
        ("edges+norm", "needs a Frequency Stage"),
    ],
)
def test_a_guidance_that_is_none_is_refused(value, message):
    config = schema.default()
    config.model.image.merging.rate, config.model.image.merging.guidance = 0.3, value
    with pytest.raises(UserError, match=re.escape(message)):
        validate(config)


def test_the_area_counts_pairs():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 4, (5, 12)), rng.random((5, 12)) < 0.4
    positive[4] = True
    for row, area in enumerate(measured.roc_area(scores, positive)):
        one, other = scores[row][positive[row]], scores[row][~positive[row]]
        if not other.size:
            assert np.isnan(area)
            continue
        wins = (one[:, None] > other) + 0.5 * (one[:, None] == other)
        np.testing.assert_allclose(area, wins.mean())


class Guided:
    """Knows where the dark patches are, and sees what the text says in the upper half."""

    preprocess = Preprocessing(SIDE)

    def guides(self, images):
        patches = images.reshape(len(images), GRID, PATCH, GRID, PATCH, 3).mean(axis=(2, 4, 5))
        light = patches.reshape(len(images), -1).astype(np.float32)
        return {"dark": -light, "light": light, "upper": -np.arange(16.0) + 0 * light}

    def saliency(self, images, texts):
        maps = np.zeros((len(images), GRID, GRID), np.float32)
        maps[:, 0] = 1.0
        return maps


def sets_of(model, spec, **changes):
    config = schema.default()
    changes = {"model.image.image_size": SIDE, "model.image.patch_size": PATCH} | changes
    config.update_from_flattened_dict({"evaluation.guidance": (spec,), **changes})
    return Sets(model, config, progress=False)


@pytest.fixture
def spec(tmp_path):
    """Four drawings, a torn file, a blank one, and two photographs without a background."""
    rng = np.random.default_rng(0)
    pictures = [drawing(*place) for place in PLACES] + [np.full((SIDE, SIDE, 3), 255, np.uint8)]
    pictures += list(rng.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8))
    rows = []
    for index, pixels in enumerate(pictures):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        (tmp_path / f"{index}.png").write_bytes(out.getvalue())
        rows.append(f'{{"image": "{index}.png", "caption": "thing {index}"}}')
    (tmp_path / "torn.png").write_bytes(b"torn")
    rows.append('{"image": "torn.png", "caption": "torn"}')
    (tmp_path / "things.jsonl").write_text("\n".join(rows))
    return f"jsonl:{tmp_path / 'things.jsonl'}#train"


def test_objects_on_drawings_and_saliency_on_photographs(spec):
    outcome = measured.score(sets_of(Guided(), spec, **{"evaluation.batch_size": 3}), spec)
    assert outcome.name == "things-train"
    assert outcome.figures["dark_object_auc"] == 1 and outcome.figures["light_object_auc"] == 0
    assert outcome.figures["upper_saliency_auc"] == 1
    assert {key: outcome.examples[key] for key in ("dark_object_auc", "dark_saliency_auc")} == {
        "dark_object_auc": 4,
        "dark_saliency_auc": 2,
    }
    assert set(outcome.chance.values()) == {0.5} and outcome.chance.keys() == outcome.figures.keys()


def test_compositions_have_objects(monkeypatch):
    drawings = open_source("emoji", "validation")
    monkeypatch.setattr(measured, "open_set", lambda *_: Compositions(drawings, 12))
    outcome = measured.score(sets_of(Guided(), "compositions"), "compositions")
    assert outcome.figures["dark_object_auc"] > 0.9 > 0.1 > outcome.figures["light_object_auc"]
    assert 0 < outcome.examples["dark_object_auc"] <= 12  # each canvas once
    assert not any(key.endswith("saliency_auc") for key in outcome.figures)


def test_what_cannot_be_measured_is_told(spec):
    class Damaged(Guided):
        def guides(self, images):
            return {"dark": np.full((len(images), 16), np.nan)}

    with pytest.raises(RunError, match="the guidance 'dark' holds NaN"):
        measured.score(sets_of(Damaged(), spec), spec)
    changes = {"model.image.architecture": "resnet"}
    with pytest.raises(UserError, match="'resnet' has no patch tokens"):
        measured.check(sets_of(None, spec, **changes), spec)
    config = sets_of(None, spec, **changes).config
    config.evaluation.guidance = ()
    apply_suite(config, "all")
    assert not config.evaluation.guidance and config.evaluation.grounding
