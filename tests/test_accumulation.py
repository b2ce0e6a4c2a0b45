"""A batch that is cut in parts: the same loss and gradient, less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import END, START, VOCABULARY, assert_same, batch, small_config

from mlip_jax.config import UserError
from mlip_jax.data.images import Preprocessing
from mlip_jax.models import two_tower
from mlip_jax.models.dropout import NUMBER, ROWS, Dropout, DropPath
from mlip_jax.training.state import initial_state
from mlip_jax.training.step import make_train_step
from mlip_jax.validation import validate


def config_of(accumulation, **changes):
    """A tiny MLIP that drops and merges, with a second view of each image."""
    config = small_config()
    config.accumulation = accumulation
    config.model.image.drop_path = config.model.text.dropout = config.model.text.drop_path = 0.2
    config.perspectives.augmented_image.weight = 0.5
    config.optimizer.ema = 0.0
    config.update_from_flattened_dict(changes)
    validate(config)
    return config


def two_views():
    return batch() | {"image_2": np.ascontiguousarray(batch()["image"][:, :, ::-1])}


@functools.cache
def loss_and_gradient(accumulation, changes=()):
    """Of one step, by an optimizer that subtracts the gradient."""
    config = config_of(accumulation, **dict(changes))
    model = two_tower.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
    optimizer = optax.scale(-1.0)
    state = jax.jit(lambda: initial_state(model, optimizer, config))()
    step = jax.jit(make_train_step(model, optimizer, config, Preprocessing.of(config)))
    after, metrics = jax.device_get(step(state, two_views()))
    return metrics, jax.tree.map(np.subtract, jax.device_get(state.params), after.params)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_it_is_the_gradient_of_the_whole_batch(accumulation):
    metrics, gradient = loss_and_gradient(accumulation)
    whole_metrics, whole = loss_and_gradient(1)
    assert_same(metrics, whole_metrics, rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole))
    assert scale > 0.01
    assert_same(gradient, whole, rtol=1e-4, atol=1e-5 * scale)


def test_what_is_dropped_is_a_matter_of_the_row_alone():
    for layer, shape in ((Dropout(0.5), (8, 3, 5)), (DropPath(0.5), (8, 3, 5))):
        x = jnp.ones(shape)

        def drop(x, numbers, layer=layer):
            rows = {ROWS: {NUMBER: jnp.array(numbers)}}
            return layer.apply(rows, x, False, rngs={"dropout": jax.random.key(0)})

        whole = layer.apply({}, x, False, rngs={"dropout": jax.random.key(0)})
        np.testing.assert_array_equal(drop(x, range(8)), whole)
        np.testing.assert_array_equal(drop(x[:3], [6, 1, 4]), whole[np.array([6, 1, 4])])
        # Two views of a row lie beside one another, and each has draws of its own.
        np.testing.assert_array_equal(drop(x[:4], [1, 3]), whole[np.array([2, 3, 6, 7])])
        kept = np.asarray(whole != 0).mean()
        assert 0 < kept < 1 and set(np.unique(whole)) == {0.0, 2.0}


def test_dropout_keeps_the_share_and_the_mean_that_it_says():
    x = jnp.ones((64, 1000))
    dropped = Dropout(0.3).apply({}, x, False, rngs={"dropout": jax.random.key(1)})
    assert float((dropped == 0).mean()) == pytest.approx(0.3, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    rows = np.asarray(dropped == 0)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_memory_falls_with_the_parts():
    def temporary(accumulation):
        config = config_of(accumulation, **{"batch_size": 256, "samples": 25600})
        model = two_tower.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
        optimizer = optax.scale(-1.0)
        step = make_train_step(model, optimizer, config, Preprocessing.of(config))
        state = jax.eval_shape(lambda: initial_state(model, optimizer, config))
        rows = {
            key: jax.ShapeDtypeStruct((256, *value.shape[1:]), value.dtype)
            for key, value in two_views().items()
        }
        compiled = jax.jit(step, donate_argnums=0).lower(state, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4) < 0.5 * temporary(1)


def test_what_it_cannot_do_is_said():
    with pytest.raises(UserError, match="batch norm would see a part of the batch"):
        config_of(2, **{"model.head": "projection_block", "model.embed_dim": 64})
    config = config_of(3)
    model = two_tower.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
    with pytest.raises(UserError, match="batch_size=16 is no multiple of config.accumulation=3"):
        make_train_step(model, optax.scale(-1.0), config, Preprocessing.of(config))
    with pytest.raises(UserError, match="config.accumulation=0 must be at least 1"):
        config_of(0)


def test_blocks_that_are_computed_again_change_nothing():
    again = {"model.image.remat": True, "model.text.remat": True}
    metrics, gradient = loss_and_gradient(1, tuple(again.items()))
    whole_metrics, whole = loss_and_gradient(1)
    assert_same(metrics, whole_metrics, rtol=1e-6)
    assert_same(gradient, whole, rtol=1e-4, atol=1e-6)
