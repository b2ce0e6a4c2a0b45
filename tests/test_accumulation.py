"""A batch that is cut in parts: the same loss and gradient, less memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from test_step import END, START, VOCABULARY, assert_same, batch, small_config

from mlip_jax.core.errors import UserError
from mlip_jax.core.schema import default
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.devices import parallel
from mlip_jax.models import building
from mlip_jax.models.dropout import NUMBER, ROWS, Dropout, DropPath
from mlip_jax.planning import hlo
from mlip_jax.training.state import abstract_state, initial_state
from mlip_jax.training.step import lower_step, make_train_step

ONE = (1, 1, 1)
MLIP, RING = (), (("ring", "always"),)
CLIP = (
    ("model.image.frequency.depth", 0),
    ("model.image.merging.guidance", "spatial"),
    ("perspectives.spatial_tokens.weight", 0.0),
    ("perspectives.frequency_global.weight", 0.0),
    ("perspectives.augmented_image.weight", 0.0),
)


def config_of(accumulation, **changes):
    """A tiny MLIP that drops and merges, with a second view of each image."""
    config = small_config()
    config.accumulation = accumulation
    config.model.image.patch_dropout = 0.5
    config.model.image.drop_path = config.model.text.dropout = config.model.text.drop_path = 0.2
    config.perspectives.augmented_image.weight = 0.5
    config.perspectives.spatial_tokens.odds = 4.0
    config.perspectives.spatial_tokens.learn_bias = True
    config.optimizer.ema = 0.0
    config.seed = 1  # by 0's parameters two tokens are so near that rounding picks the one to merge
    config.update_from_flattened_dict(changes)
    validate(config)
    return config


def two_views():
    return batch() | {"image_2": np.ascontiguousarray(batch()["image"][:, :, ::-1])}


@functools.cache
def program(accumulation, changes=MLIP, shape=ONE):
    """The start, and a compiled step by an optimizer that subtracts the gradient, on a mesh."""
    config = config_of(accumulation, **dict(changes))
    axes = ConfigDict(dict(zip(parallel.AXES, shape, strict=True)))
    mesh = parallel.make_mesh(axes, config.batch_size, jax.devices()[: math.prod(shape)])
    model = building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
    optimizer = optax.scale(-1.0)
    state = abstract_state(model, optimizer, config, mesh)
    step = make_train_step(model, optimizer, config, Preprocessing.of(config), mesh)
    compiled = lower_step(step, state, config, mesh).compile()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def start():
        return jax.jit(lambda: initial_state(model, optimizer, config), out_shardings=shardings)()

    return start, compiled, mesh


@functools.cache
def loss_and_gradient(accumulation, changes=MLIP, shape=ONE):
    start, step, mesh = program(accumulation, changes, shape)
    views = batch() if changes == CLIP else two_views()
    state = start()
    before = jax.device_get(state.params)
    after, metrics = jax.device_get(step(state, parallel.global_batch(views, mesh)))
    return metrics, jax.tree.map(np.subtract, before, after.params)


def assert_same_gradient(actual, expected):
    metrics, gradient = actual
    whole_metrics, whole_gradient = expected
    assert_same(metrics, whole_metrics, rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole_gradient))
    assert scale > 0.01
    assert_same(gradient, whole_gradient, rtol=1e-4, atol=1e-5 * scale)


def test_it_is_the_gradient_of_the_whole_batch():
    assert_same_gradient(loss_and_gradient(4), loss_and_gradient(1))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [((8, 1, 1), RING), ((4, 2, 1), MLIP), ((2, 2, 2), CLIP)],
    ids=["data", "fsdp", "tensor"],
)
def test_on_a_mesh_too_and_no_part_waits_for_another_device(shape, changes):
    expected = loss_and_gradient(1, CLIP if changes == CLIP else MLIP)
    assert_same_gradient(loss_and_gradient(2, changes, shape), expected)
    start, step, _ = program(2, changes, shape)
    parsed = hlo.read(step.as_text(), math.prod(shape))
    repeated = {collective.kind for collective in parsed.collectives if collective.times > 1}
    assert parsed.unknown_loops == 0
    assert repeated == ({"collective-permute"} if changes == RING else set())
    # Virtual CPU devices meet collectives in the same order, except those within a branch.
    assert " conditional(" not in step.as_text()
    # The gradient is added up once, not once a part.
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(start).params))
    sums = [c.payload for c in parsed.collectives if c.kind in ("all-reduce", "reduce-scatter")]
    assert size <= sum(sums) < 1.5 * size


def test_what_is_dropped_is_a_matter_of_the_row_alone():
    for layer, shape in ((Dropout(0.5), (8, 3, 5)), (DropPath(0.5), (8, 3, 5))):
        x = jnp.ones(shape)

        def drop(x, numbers, layer=layer):
            rows = {ROWS: {NUMBER: jnp.array(numbers)}}
            return layer.apply(rows, x, False, rngs={"dropout": jax.random.key(0)})

        all_rows = layer.apply({}, x, False, rngs={"dropout": jax.random.key(0)})
        np.testing.assert_array_equal(drop(x, range(8)), all_rows)
        np.testing.assert_array_equal(drop(x[:3], [6, 1, 4]), all_rows[np.array([6, 1, 4])])
        # Two views of a row lie beside one another, and each has draws of its own.
        np.testing.assert_array_equal(drop(x[:4], [1, 3]), all_rows[np.array([2, 3, 6, 7])])
        kept_share = np.asarray(all_rows != 0).mean()
        assert 0 < kept_share < 1 and set(np.unique(all_rows)) == {0.0, 2.0}


def test_dropout_keeps_the_share_and_the_mean_that_it_says():
    x = jnp.ones((64, 1000))
    dropped = Dropout(0.3).apply({}, x, False, rngs={"dropout": jax.random.key(1)})
    assert float((dropped == 0).mean()) == pytest.approx(0.3, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    rows = np.asarray(dropped == 0)
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("shape", [ONE, (4, 2, 1)], ids=["one device", "mesh"])
def test_memory_falls_with_the_parts(shape):
    rows = 64 * math.prod(shape)
    changes = (*CLIP, ("batch_size", rows), ("samples", rows))

    def temporary(accumulation):
        _, step, _ = program(accumulation, changes, shape)
        return step.memory_analysis().temp_size_in_bytes

    assert temporary(4) < 0.5 * temporary(1)


def test_what_it_cannot_do_is_said():
    with pytest.raises(UserError, match="batch norm would see a part of the batch"):
        config_of(2, **{"model.head": "projection_block", "model.embed_dim": 64})
    config = default()
    config.accumulation, config.model.image.architecture = 2, "resnet"
    config.model.image.depth, config.model.image.stem = 18, "small"
    with pytest.raises(UserError, match="accumulation=2 does not go with config.model.image.arch"):
        validate(config)
    config = config_of(3)
    model = building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
    with pytest.raises(UserError, match="batch_size=16 is no multiple of config.accumulation=3"):
        make_train_step(model, optax.scale(-1.0), config, Preprocessing.of(config))
    with pytest.raises(UserError, match="config.accumulation=0 must be at least 1"):
        config_of(0)


def test_blocks_that_are_computed_again_change_nothing():
    again = {"model.image.remat": True, "model.text.remat": True}
    metrics, gradient = loss_and_gradient(1, tuple(again.items()))
    whole_metrics, whole_gradient = loss_and_gradient(1)
    assert_same(metrics, whole_metrics, rtol=1e-6)
    assert_same(gradient, whole_gradient, rtol=1e-4, atol=1e-6)
