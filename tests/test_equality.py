"""Rows of one record or of equal texts: no negatives of each other, whatever the loss and mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.core.registry import LOSSES
from mlip_jax.devices import parallel
from mlip_jax.objectives import contrastive, equality, tokenwise
from mlip_jax.objectives.losses import Scoring, Tokens

BATCH, SHIFTS, ODDS = 16, 3, 3.0
RECORD = np.array([0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 0, 11, 12, 13, 14, 3], np.uint32)
WORDS = np.array(
    [0, 1, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 1, 15]
)  # rows 1, 2 and 14 say alike
EQUAL = (RECORD[:, None] == RECORD) | (WORDS[:, None] == WORDS)
OTHERS = EQUAL & ~np.eye(BATCH, dtype=bool)


def keys(words=WORDS):
    token_ids = np.stack([words, words + 1, np.full(BATCH, 9)], axis=1).astype(np.int32)
    return equality.Keys(jnp.asarray(RECORD), equality.text_keys(jnp.asarray(token_ids)))


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings():
    rng = np.random.default_rng(0)
    return jnp.asarray(unit(rng, BATCH, 8)), jnp.asarray(unit(rng, BATCH, 8))


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(1)
    weights = jnp.full((BATCH, 5), 0.2, jnp.float32)
    mask = jnp.arange(4) < rng.integers(1, 5, (BATCH, 1))
    image, text = (jnp.asarray(unit(rng, BATCH, count, 6)) for count in (5, 4))
    return Tokens(image, text, weights, mask)


def expected(loss, to_texts, to_images):
    """The losses with sums over pairs that are written out, the equal ones left out."""

    def one(scores):
        if loss == "softmax":
            return jnp.mean(jax.nn.logsumexp(scores, axis=1, where=~OTHERS) - jnp.diagonal(scores))
        if loss == "sigmoid":
            negatives = jnp.where(EQUAL, 0.0, jax.nn.softplus(scores)).sum()
            return (negatives + jax.nn.softplus(-jnp.diagonal(scores)).sum()) / BATCH
        rows = np.arange(BATCH)
        negatives = [
            jnp.where(EQUAL[rows, after], 0.0, jax.nn.softplus(scores[rows, after]))
            for after in ((rows + shift) % BATCH for shift in range(1, SHIFTS + 1))
        ]
        positives = jax.nn.softplus(-jnp.diagonal(scores))
        return jnp.mean(positives) + ODDS * jnp.mean(jnp.stack(negatives))

    return (one(to_texts) + one(to_images.T if loss == "softmax" else to_images)) / 2


MESHES = [("one device", None, "never"), ("one device", None, "always")]
MESHES += [("eight", (8, 1, 1), "never"), ("eight", (4, 2, 1), "always")]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "jsd"])
@pytest.mark.parametrize("level", ["embeddings", "tokens"])
def test_equal_rows_are_no_negatives(request, embeddings, tokens, loss, level):
    scale = jnp.float32(7.0)
    bias = jnp.float32(-3.0)  # softmax takes none, and feels none
    sides = embeddings if level == "embeddings" else (tokens.image, tokens.text)

    def reference(image, text):
        if level == "embeddings":
            both = (contrastive.similarity(image, text),) * 2
        else:
            both = tokenwise.block_similarity(image, text, tokens.weights, tokens.mask)
        return expected(loss, *(scale * similarity + bias for similarity in both))

    def ours(image, text, blocks, mesh):
        scoring = Scoring(scale, bias, SHIFTS, 4, blocks, mesh, keys(), ODDS)
        if level == "embeddings":
            return LOSSES[loss].of_embeddings(image, text, scoring)
        given = Tokens(image, text, tokens.weights, tokens.mask)
        return LOSSES[loss].of_tokens(given, scoring)

    value, gradient = jax.value_and_grad(reference, (0, 1))(*sides)
    for name, shape, blocks in MESHES:
        mesh = shape and jax.make_mesh(
            shape, parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
        )
        form = functools.partial(ours, blocks=blocks, mesh=mesh)
        got, got_gradient = jax.jit(jax.value_and_grad(form, (0, 1)))(*sides)
        np.testing.assert_allclose(got, value, rtol=2e-5, err_msg=f"{name} {blocks}")
        for one, other in zip(got_gradient, gradient, strict=True):
            np.testing.assert_allclose(one, other, atol=3e-6, err_msg=f"{name} {blocks}")


def test_texts_count_only_where_they_are_asked_for(embeddings):
    records_alone = keys()._replace(text=None)
    assert bool(equality.equal_to_all(keys(), keys())[1, 2])
    assert not bool(equality.equal_to_all(records_alone, records_alone)[1, 2])
    different = equality.Keys(jnp.arange(BATCH, dtype=jnp.uint32), None)
    plain = LOSSES["softmax"].of_embeddings(*embeddings, Scoring(7.0))
    same = LOSSES["softmax"].of_embeddings(*embeddings, Scoring(7.0, keys=different))
    assert float(plain) == float(same)


def test_false_negatives_are_counted():
    _, text = keys()
    assert float(equality.false_negatives(jnp.asarray(RECORD), text)) == OTHERS.sum()


def test_keys_tell_texts_apart():
    rng = np.random.default_rng(3)
    token_ids = rng.integers(0, 3, (4000, 6)).astype(np.int32)
    token_ids[:2000, 5] = 32768 * (token_ids[:2000, 5] % 2)  # all that differs is one high bit
    text = np.asarray(equality.text_keys(jnp.asarray(token_ids)))
    assert len(np.unique(text, axis=0)) == len(np.unique(token_ids, axis=0))
