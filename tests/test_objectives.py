"""The losses: the published values and gradients, and little memory."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_losses import token_loss as token_level_loss

from mlip_jax import objectives
from mlip_jax.core import schema
from mlip_jax.objectives import perspectives

DATA = Path(__file__).parent / "data"
LOSSES = ("softmax", "sigmoid", "jsd")


@pytest.fixture(scope="module")
def published():
    with np.load(DATA / "contrastive_losses.npz") as file:
        return dict(file)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


@pytest.fixture(scope="module")
def tokens():
    """11 images of 6 tokens, 11 texts of up to 5 words; none without words."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5, (11, 6)).astype(np.float32)
    return {
        "image_tokens": unit(rng, 11, 6, 8),
        "text_tokens": unit(rng, 11, 5, 8),
        "image_weights": jnp.asarray(sizes / sizes.sum(axis=1, keepdims=True)),
        "text_mask": jnp.arange(5) < jnp.asarray(rng.integers(1, 6, (11, 1))),
    }


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_published_values_and_gradients(published, case, loss):
    names = ("image", "text", "scale") + (("bias",) if loss == "sigmoid" else ())
    function = getattr(objectives, f"{loss}_contrastive")
    value, gradients = jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(names)))))(
        *(published[f"{case}_{name}"] for name in names)
    )
    np.testing.assert_allclose(value, published[f"{case}_{loss}_loss"], rtol=1e-5)
    for name, gradient in zip(names, gradients, strict=True):
        expected = published[f"{case}_{loss}_grad_{name}"]
        # Entries near 0 are differences of larger ones: measured against the whole gradient.
        room = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=room, err_msg=name)


def test_published_jsd():
    with np.load(DATA / "jsd.npz") as file:
        image, text = (
            x / np.linalg.norm(x, axis=-1, keepdims=True)
            for x in (file["projected_image"], file["projected_text"])
        )
        positive, negative = file["positive_score"], file["negative_score"]
        expected = file["loss"]
        value = objectives.jsd(jnp.asarray(image), jnp.asarray(text), jnp.asarray(file["scale"]))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # The reference's loss is that of its own scores: the negatives are the next rows.
    by_hand = np.logaddexp(0, -positive).mean() + np.logaddexp(0, negative).mean()
    np.testing.assert_allclose(value, by_hand, rtol=1e-5)


def test_jsd_negatives_are_the_next_rows():
    rng = np.random.default_rng(1)
    image, text = unit(rng, 6, 8), unit(rng, 6, 8)
    scores = 9.0 * np.asarray(image) @ np.asarray(text).T
    negatives = [scores[i, (i + k) % 6] for i in range(6) for k in (1, 2, 3)]
    expected = np.logaddexp(0, -np.diag(scores)).mean() + np.logaddexp(0, negatives).mean()
    np.testing.assert_allclose(objectives.jsd(image, text, 9.0, shifts=3), expected, rtol=1e-5)


@pytest.mark.parametrize("level", ["global", "tokens"])
@pytest.mark.parametrize(("odds", "bias"), [(1.0, 0.0), (3.5, -2.0)])
def test_jsd_with_odds_and_bias_is_its_formula(tokens, level, odds, bias):
    """softplus(-T) of pairs + odds * the mean softplus(T) of negatives: values and gradients."""
    shifts, batch = 4, 11
    rng = np.random.default_rng(4)
    if level == "global":
        sides = unit(rng, batch, 8), unit(rng, batch, 8)
    else:
        sides = tokens["image_tokens"], tokens["text_tokens"]
    rest = tokens["image_weights"], tokens["text_mask"]

    def ours(one, other, scale, bias):
        if level == "global":
            return objectives.jsd(one, other, scale, shifts, odds=odds, bias=bias)
        how = {"shifts": shifts, "odds": odds}
        return token_level_loss("jsd", one, other, *rest, scale, bias, **how)

    def by_hand(one, other, scale, bias):
        both = [one @ other.T] if level == "global" else similarity(one, other, *rest)
        losses = []
        for cosines in both:
            scores = scale * cosines + bias
            pairs = sum(jnp.log1p(jnp.exp(-scores[i, i])) for i in range(batch)) / batch
            negatives = [
                jnp.log1p(jnp.exp(scores[i, (i + k) % batch]))
                for i in range(batch)
                for k in range(1, shifts + 1)
            ]
            losses.append(pairs + odds * sum(negatives) / (shifts * batch))
        return sum(losses) / len(losses)

    inputs = *sides, jnp.float32(5.0), jnp.float32(bias)
    one, other = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(*inputs) for f in (ours, by_hand)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


def test_jsd_of_all_negatives_at_their_odds_is_the_sigmoid_loss():
    rng = np.random.default_rng(5)
    image, text = unit(rng, 6, 8), unit(rng, 6, 8)
    one = objectives.jsd(image, text, 9.0, shifts=5, odds=5.0, bias=-3.0)
    np.testing.assert_allclose(
        one, objectives.sigmoid_contrastive(image, text, 9.0, -3.0), rtol=1e-5
    )


def test_jsd_of_two_pairs_is_the_sigmoid_loss_without_bias():
    rng = np.random.default_rng(2)
    image, text, scale = unit(rng, 2, 8), unit(rng, 2, 8), jnp.float32(5.0)

    @jax.jit
    def both(image, text, scale):
        arguments = (0, 1, 2)
        one = jax.value_and_grad(objectives.jsd, arguments)(image, text, scale)
        sigmoid = jax.value_and_grad(objectives.sigmoid_contrastive, arguments)
        return one, sigmoid(image, text, scale, 0.0)

    one, other = both(image, text, scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


def test_jsd_with_every_shift_weighs_negatives_as_the_mean_over_all_of_them():
    """All batch - 1 shifts: the sigmoid loss but for the weight of its negatives."""
    rng = np.random.default_rng(3)
    image, text = unit(rng, 5, 8), unit(rng, 5, 8)
    scores = 5.0 * np.asarray(image) @ np.asarray(text).T
    positive = np.logaddexp(0, -np.diag(scores)).mean()
    negatives = objectives.sigmoid_contrastive(image, text, 5.0, 0.0) - positive
    expected = positive + negatives / 4
    np.testing.assert_allclose(objectives.jsd(image, text, 5.0, shifts=4), expected, rtol=1e-5)


@pytest.mark.parametrize(("batch", "shifts"), [(1, 1), (4, 4), (4, 0)])
def test_a_pair_is_never_its_own_negative(batch, shifts):
    x = jnp.ones((batch, 8))
    with pytest.raises(ValueError, match=f"{shifts} shifts needs a batch"):
        objectives.jsd(x, x, 1.0, shifts=shifts)
    mask, weights = jnp.ones((batch, 3), bool), jnp.full((batch, 3), 1 / 3)
    x = jnp.ones((batch, 3, 8))
    with pytest.raises(ValueError, match=f"{shifts} shifts needs a batch"):
        token_level_loss("jsd", x, x, weights, mask, 1.0, shifts=shifts)


def test_published_tokenwise_similarity():
    with np.load(DATA / "tokenwise_similarity.npz") as file:
        image, text = jnp.asarray(file["image_tokens"]), jnp.asarray(file["text_tokens"])
        mask = jnp.asarray(file["text_mask"])
        expected = file["image_to_text"], file["text_to_image"]
    weights = jnp.full(image.shape[:2], 1 / image.shape[1])
    similarities = objectives.tokenwise_similarity(image, text, weights, mask)
    for one, other in zip(similarities, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@functools.partial(jax.jit, static_argnames="chunk")
def similarity(image_tokens, text_tokens, image_weights, text_mask, chunk=4):
    return objectives.tokenwise_similarity(
        image_tokens, text_tokens, image_weights, text_mask, chunk=chunk
    )


def similarity_by_hand(image_tokens, text_tokens, image_weights, text_mask):
    shape = len(image_tokens), len(text_tokens)
    image_to_text, text_to_image = np.zeros(shape), np.zeros(shape)
    for i, (image, weights) in enumerate(zip(image_tokens, image_weights, strict=True)):
        for j, (text, mask) in enumerate(zip(text_tokens, text_mask, strict=True)):
            products = np.asarray(image) @ np.asarray(text)[np.asarray(mask)].T
            image_to_text[i, j] = np.sum(np.asarray(weights) * products.max(axis=1))
            text_to_image[i, j] = products.max(axis=0).mean()
    return image_to_text, text_to_image


def test_merged_tokens_weigh_what_they_stand_for(tokens):
    similarities = similarity(**tokens)
    for one, other in zip(similarities, similarity_by_hand(**tokens), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_token_of_size_two_is_worth_two_tokens(tokens):
    images = tokens["image_tokens"]
    twice = jnp.concatenate([images, images[:, :1]], axis=1)
    merged = jnp.asarray([2, 1, 1, 1, 1, 1], jnp.float32)[None] / 7
    texts, mask = tokens["text_tokens"], tokens["text_mask"]
    one = similarity(images, texts, jnp.tile(merged, (11, 1)), mask)
    other = similarity(twice, texts, jnp.full((11, 7), 1 / 7), mask)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@functools.partial(jax.jit, static_argnames=("loss", "chunk"))
def token_loss(loss, tokens, chunk):
    def function(image, text, scale):
        weights, mask = tokens["image_weights"], tokens["text_mask"]
        return token_level_loss(
            loss, image, text, weights, mask, scale, -1.0, shifts=2, chunk=chunk
        )

    arguments = tokens["image_tokens"], tokens["text_tokens"], jnp.float32(7.0)
    return jax.value_and_grad(function, argnums=(0, 1, 2))(*arguments)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_chunk_moves_neither_value_nor_gradient(tokens, loss):
    unchunked = token_loss(loss, tokens, chunk=64)
    for chunk in (1, 4):  # 4 does not divide 11
        chunked = token_loss(loss, tokens, chunk)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), chunked, unchunked
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_token_losses_are_the_mean_of_both_directions(tokens, loss):
    image_to_text, text_to_image = similarity_by_hand(**tokens)

    def by_hand(scores, axis):
        if loss == "softmax":
            top = np.log(np.sum(np.exp(scores), axis=axis))
            return (top - np.diag(scores)).mean()
        if loss == "sigmoid":
            sign = 2 * np.eye(11) - 1
            return np.logaddexp(0, -sign * (scores - 1)).sum() / 11
        negatives = [scores[i, (i + k) % 11] - 1 for i in range(11) for k in (1, 2)]
        return np.logaddexp(0, 1 - np.diag(scores)).mean() + np.logaddexp(0, negatives).mean()

    expected = (by_hand(7 * image_to_text, 1) + by_hand(7 * text_to_image, 0)) / 2
    value, _ = token_loss(loss, tokens, chunk=4)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_words_have_no_influence(tokens, loss):
    value, (_, gradient, _) = token_loss(loss, tokens, chunk=4)
    mask = tokens["text_mask"]
    assert not mask.all()
    # Larger than any word: it would win every maximum.
    noise = jnp.where(mask[..., None], tokens["text_tokens"], 1e3)
    other, _ = token_loss(loss, tokens | {"text_tokens": noise}, chunk=4)
    np.testing.assert_array_equal(value, other)
    np.testing.assert_array_equal(gradient[~mask], 0.0)
    assert np.abs(gradient[mask]).max() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_text_without_words_is_harmless(tokens, loss):
    empty = tokens | {"text_mask": tokens["text_mask"].at[3].set(False)}
    value, gradients = token_loss(loss, empty, chunk=4)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_array_equal(gradients[1][3], 0.0)


def temporary_bytes(loss, batch, tokens, words, chunk):
    def function(image, text, weights, mask, scale):
        return token_level_loss(loss, image, text, weights, mask, scale, chunk=chunk)

    shapes = [(batch, tokens, 16), (batch, words, 16), (batch, tokens), (batch, words), ()]
    dtypes = [jnp.float32, jnp.float32, jnp.float32, bool, jnp.float32]
    abstract = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
    compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*abstract).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_scores_of_all_token_pairs_never_exist_whole(loss):
    batch, tokens, words = 128, 49, 32
    all_scores_bytes = batch * batch * tokens * words * 4
    assert temporary_bytes(loss, batch, tokens, words, chunk=2) < all_scores_bytes / 8
    if loss == "softmax":  # the measure sees it where it does exist
        assert temporary_bytes(loss, batch, tokens, words, chunk=batch) > all_scores_bytes


def test_jsd_scores_few_pairs():
    batch, tokens, words = 128, 49, 32
    assert temporary_bytes("jsd", batch, tokens, words, chunk=4) < 12 * batch * tokens * words * 4


@pytest.fixture(scope="module")
def embeddings(tokens):
    rng = np.random.default_rng(5)
    return {
        "spatial_global": unit(rng, 11, 8),
        "frequency_global": unit(rng, 11, 8),
        "spatial_tokens": tokens["image_tokens"],
        "frequency_tokens": unit(rng, 11, 9, 8),
        "sizes": tokens["image_weights"] * 9,
        "text_global": unit(rng, 11, 8),
        "text_tokens": tokens["text_tokens"],
        "text_mask": tokens["text_mask"],
    }


def test_the_total_is_the_weighted_sum(embeddings, tokens):
    config = schema.default()
    weights = dict(zip(schema.IMAGE_VIEWS, (1.0, 0.5, 2.0, 0.0), strict=True))
    for view, weight in weights.items():
        config.perspectives[view].weight = weight
    config.perspectives.frequency_global.loss = "sigmoid"
    config.perspectives.spatial_tokens.loss = "jsd"
    scales = {view: jnp.float32(3 + index) for index, view in enumerate(weights)}
    biases = {"frequency_global": jnp.float32(-2.0)}
    terms = perspectives.terms(config)
    total_loss = jax.jit(perspectives.total_loss, static_argnums=0, static_argnames="chunk")
    assert {term.view for term in terms} == {view for view in weights if weights[view]}
    total, losses = total_loss(terms, embeddings, scales, biases, jnp.float32(0), chunk=4)
    expected = {
        "spatial_global": objectives.softmax_contrastive(
            embeddings["spatial_global"], embeddings["text_global"], 3.0
        ),
        "frequency_global": objectives.sigmoid_contrastive(
            embeddings["frequency_global"], embeddings["text_global"], 4.0, -2.0
        ),
        "spatial_tokens": token_level_loss("jsd", **tokens, scale=5.0),
    }
    assert losses.keys() == expected.keys()
    for view, value in expected.items():
        np.testing.assert_allclose(losses[view], value, rtol=1e-5, err_msg=view)
    by_hand = sum(weights[view] * value for view, value in expected.items())
    np.testing.assert_allclose(total, by_hand, rtol=1e-5)


def test_odds_of_0_are_those_of_the_other_rows():
    config = schema.from_json("{}")  # as runs before the key wrote it
    assert perspectives.terms(config)[0].odds == 1.0
    config.batch_size, config.perspectives.spatial_global.odds = 48, 0.0
    assert perspectives.terms(config)[0].odds == 47.0


def test_a_weight_warms_up(embeddings):
    term = perspectives.Term("spatial_global", "softmax", 2.0, 1, 100)
    scales = {"spatial_global": jnp.float32(3.0)}
    total_loss = jax.jit(perspectives.total_loss, static_argnums=0, static_argnames="chunk")
    for samples, weight in [(0, 0), (50, 1), (100, 2), (1000, 2)]:
        total, losses = total_loss((term,), embeddings, scales, {}, jnp.float32(samples), chunk=4)
        np.testing.assert_allclose(total, weight * losses["spatial_global"], rtol=1e-6)


def test_frequency_tokens_weigh_the_same(embeddings):
    term = perspectives.Term("frequency_tokens", "softmax", 1.0, 1, 0)
    loss = perspectives.term_loss(term, embeddings, jnp.float32(3.0), 0.0, chunk=4)
    expected = token_level_loss(
        "softmax",
        embeddings["frequency_tokens"],
        embeddings["text_tokens"],
        jnp.full((11, 9), 1 / 9),
        embeddings["text_mask"],
        3.0,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
