"""One training step: it learns, on any mesh alike, and survives a loss that is not a number."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from mlip_jax.core import schema
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.devices import parallel
from mlip_jax.models import building
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.state import abstract_state, initial_state
from mlip_jax.training.step import make_train_step

BATCH, START, END, VOCABULARY = 16, 62, 63, 64


def small_config():
    """A tiny MLIP: Frequency Stage, merging, dropout, three perspectives."""
    config = schema.default()
    config.batch_size, config.samples, config.token_chunk = BATCH, 100 * BATCH, 4
    image, text = config.model.image, config.model.text
    image.image_size, image.patch_size, image.width, image.depth, image.heads = 16, 4, 32, 2, 2
    image.frequency.depth, image.merging.rate, image.dropout = 1, 0.25, 0.1
    text.context_length, text.width, text.depth, text.heads = 8, 32, 1, 2
    config.model.embed_dim = config.model.token_dim = 16
    config.perspectives.spatial_tokens.weight = 0.5
    config.perspectives.spatial_tokens.loss = "jsd"
    frequency = config.perspectives.frequency_global
    frequency.weight, frequency.loss, frequency.init_bias = 0.5, "sigmoid", -5.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_samples = 4 * BATCH
    config.optimizer.ema = 0.15
    # Adam divides by the gradient's size: without this, rounding alone would move a parameter
    # whose gradient is 0, such as the keys' bias, by a whole learning rate.
    config.optimizer.eps = 1e-3
    validate(config)
    return config


@functools.cache
def parts():
    config = small_config()
    model = building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
    optimizer = optimizers.make(config)
    train_step = make_train_step(model, optimizer, config, Preprocessing.of(config))
    return config, model, optimizer, train_step


@functools.cache
def compiled_step():
    return jax.jit(parts()[-1])


@functools.cache
def start():
    config, model, optimizer, _ = parts()
    return jax.jit(lambda: initial_state(model, optimizer, config))()


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    token_ids = np.zeros((BATCH, 8), np.int32)
    token_ids[:, 0] = START
    for row, words in zip(token_ids, rng.integers(1, 6, BATCH), strict=True):
        row[1 : 1 + words] = rng.integers(1, 60, words)
        row[1 + words] = END
    image = rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)
    return {"image": image, "token_ids": token_ids, "record": np.arange(BATCH, dtype=np.int32)}


@functools.cache
def history():
    """States and metrics of 20 steps on one batch, as numpy; states[0] is the start."""
    state, states, metrics = start(), [jax.device_get(start())], []
    for _ in range(20):
        state, step_metrics = compiled_step()(state, batch())
        states.append(jax.device_get(state))
        metrics.append({key: float(value) for key, value in step_metrics.items()})
    return states, metrics


def assert_same(one, other, **tolerance):
    def compare(path, a, b):
        name = parallel.path_name(path)
        if tolerance:
            np.testing.assert_allclose(a, b, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, jax.device_get(one), jax.device_get(other))


def test_a_few_steps_on_one_batch_lower_its_loss():
    states, metrics = history()
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert [int(state.step) for state in states] == list(range(21))
    for step_metrics in metrics:
        total = step_metrics["loss/spatial_global"] + 0.5 * (
            step_metrics["loss/spatial_tokens"] + step_metrics["loss/frequency_global"]
        )
        np.testing.assert_allclose(step_metrics["loss"], total, rtol=1e-5)
        assert step_metrics["gradient_norm"] > 0
    np.testing.assert_allclose(metrics[0]["scale/spatial_global"], 1 / 0.07, rtol=1e-5)
    schedule = optimizers.learning_rate(parts()[0])
    for step in (0, 10):
        expected = schedule(jnp.asarray(step))
        np.testing.assert_allclose(metrics[step]["learning_rate"], expected, rtol=1e-5)


def test_every_parameter_learns():
    before, after = (history()[0][index].params for index in (0, 20))
    for path, change in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    ):
        assert change > 0, parallel.path_name(path)


def test_the_same_state_and_batch_give_the_same_bits():
    state = start()
    for _ in range(2):
        state, metrics = compiled_step()(state, batch())
    states, past = history()
    assert_same(state, states[2])
    assert float(metrics["loss"]) == past[1]["loss"]


def test_dropout_follows_the_step():
    later, _ = compiled_step()(start().replace(step=jnp.asarray(7, jnp.int32)), batch())
    moments = later.optimizer[1][0].mu, history()[0][1].optimizer[1][0].mu
    kernel = [moment["image_encoder"]["spatial_0"]["mlp"]["down"]["kernel"] for moment in moments]
    assert np.abs(kernel[0] - kernel[1]).max() > 0


def test_a_sharded_run_is_the_run_of_one_device_and_is_traced_once():
    config, model, optimizer, train_step = parts()
    mesh = parallel.make_mesh(ConfigDict({"data": 4, "fsdp": 2, "tensor": 1}), BATCH)
    abstract = abstract_state(model, optimizer, config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(lambda: initial_state(model, optimizer, config), out_shardings=shardings)()
    assert_same(state, history()[0][0], rtol=1e-6, atol=1e-7)
    traces = []

    def counted(state, batch):
        traces.append(None)
        return train_step(state, batch)

    step = jax.jit(counted, donate_argnums=0, out_shardings=(shardings, parallel.replicated(mesh)))
    rows = parallel.global_batch(batch(), mesh)
    states, metrics = history()
    for index in range(3):
        state, step_metrics = step(state, rows)
        for key, value in step_metrics.items():
            np.testing.assert_allclose(value, metrics[index][key], rtol=1e-3, err_msg=key)
        assert_same(state.params, states[index + 1].params, rtol=1e-3, atol=2e-5)
    # A weak type or a sharding that moved would compile again at the second step.
    assert len(traces) == 1 and step._cache_size() == 1
    jax.tree.map(
        lambda leaf, expected: (
            (
                leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
                and (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
            )
            or pytest.fail(f"{leaf.sharding} is not {expected.sharding}")
        ),
        state,
        abstract,
    )


def test_a_loss_that_is_not_a_number_changes_nothing_but_the_step():
    good = jax.tree.map(jnp.asarray, history()[0][5])
    params = dict(good.params)
    params["text_heads_text_global"] = jax.tree.map(
        lambda leaf: leaf.at[0].set(jnp.nan), params["text_heads_text_global"]
    )
    bad = good.replace(params=params)
    after, metrics = compiled_step()(bad, batch())
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["gradient_norm"])
    assert int(after.step) == int(bad.step) + 1
    assert_same(after.replace(step=bad.step), bad)


def test_the_logit_scale_stays_between_1_and_its_maximum():
    params = dict(start().params)
    params["log_scale_spatial_global"] = jnp.asarray(6.0, jnp.float32)
    params["log_scale_spatial_tokens"] = jnp.asarray(-2.0, jnp.float32)
    after, _ = compiled_step()(start().replace(params=params), batch())
    top = after.params["log_scale_spatial_global"]
    np.testing.assert_allclose(top, math.log(100), rtol=1e-6)
    assert after.params["log_scale_spatial_tokens"] == 0.0


def test_the_average_follows_early_and_remembers_late():
    states, _ = history()
    assert_same(states[0].ema, states[0].params)
    for step, rate in [(0, 0.1), (1, 0.15), (6, 0.15)]:  # min(0.15, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda old, new, rate=rate: rate * old + (1 - rate) * new,
            states[step].ema,
            states[step + 1].params,
        )
        assert_same(states[step + 1].ema, expected, rtol=1e-5, atol=1e-7)
    assert_same(states[3].evaluated["params"], states[3].ema)
    assert_same(states[3].replace(ema={}).evaluated["params"], states[3].params)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_and_filters_decay(name):
    config = small_config()
    config.optimizer.name = name
    optimizer, params = optimizers.make(config), start().params

    @jax.jit
    def decayed(params):
        updates, _ = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )
        return updates

    rate = float(optimizers.learning_rate(config)(jnp.asarray(0)))
    seen_names = set()
    for path, update in jax.tree_util.tree_leaves_with_path(jax.device_get(decayed(params))):
        name = parallel.path_name(path)
        last = name.rsplit("/", 1)[-1]
        if last in ("kernel", "filter", "embedding"):
            leaf = functools.reduce(lambda node, key: node[key.key], path, params)
            expected = -rate * config.optimizer.weight_decay * np.asarray(leaf)
            np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-9, err_msg=name)
        else:
            np.testing.assert_array_equal(update, 0.0, err_msg=name)
        seen_names.add(re.sub(r"_(spatial|frequency)_(global|tokens)$", "", last))
    matrices = {"kernel", "filter", "embedding"}
    assert seen_names == matrices | {"bias", "scale", "position", "class_token", "log_scale"}


def test_the_learning_rate_rises_then_falls_to_zero():
    config = small_config()
    steps, peak = np.arange(100), config.optimizer.learning_rate
    rates = np.asarray(jax.vmap(optimizers.learning_rate(config))(jnp.asarray(steps)))
    np.testing.assert_allclose(rates[:4], peak * np.array([0.25, 0.5, 0.75, 1.0]), rtol=1e-5)
    assert (np.diff(rates[3:]) < 0).all()
    np.testing.assert_allclose(rates[51], peak / 2, rtol=1e-5)  # half of what follows the warm-up
    np.testing.assert_allclose(rates[-1], 0.0, atol=1e-9)


def test_muon_turns_kernels_orthogonally_and_leaves_the_rest_to_adamw():
    config = small_config()
    config.optimizer.weight_decay = config.optimizer.clip_norm = 0.0
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 4, 24), "embedding": (20, 8), "bias": (8,)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    gradient = {name: jnp.asarray(rng.normal(size=s), "float32") for name, s in shapes.items()}
    config.optimizer.name = "muon"
    updates, expected = (
        optimizer.update(gradient, optimizer.init(params), params)[0]
        for optimizer in (
            optimizers.make(config),
            optax.nadamw(optimizers.learning_rate(config), 0.9, 0.98, eps=1e-3, weight_decay=0.0),
        )
    )
    for name in ("embedding", "bias"):
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)
    rate = float(optimizers.learning_rate(config)(jnp.asarray(0)))
    turned = np.asarray(updates["kernel"]).reshape(-1, 24) / -rate
    gains = np.linalg.svd(turned, compute_uv=False) / (0.2 * math.sqrt(36))
    assert (gains > 0.6).all() and (gains < 1.3).all()  # Newton-Schulz stops near 1
    left, _, right = np.linalg.svd(np.asarray(gradient["kernel"]).reshape(-1, 24), False)
    assert np.sum(turned * (left @ right)) > 0.9 * np.linalg.norm(turned) * math.sqrt(24)


def test_a_sharded_update_of_muon_is_the_update_of_one_device():
    config = small_config()
    config.optimizer.name = "muon"
    optimizer, params = optimizers.make(config), start().params
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "f"), params)

    def update(gradient, params):
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    mesh = parallel.make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}), BATCH)
    shardings = parallel.tree_shardings(params, mesh)
    placed = jax.device_put(gradient, shardings), jax.device_put(params, shardings)
    many = jax.jit(update, out_shardings=shardings)(*placed)
    assert_same(many, jax.jit(update)(gradient, params), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_gradients_are_clipped_by_their_global_norm(clip_norm):
    config = small_config()
    config.optimizer.clip_norm, config.optimizer.eps = clip_norm, 1.0
    config.optimizer.weight_decay = 0.0
    optimizer, params = optimizers.make(config), {"kernel": jnp.ones((2, 2))}
    state = optimizer.init(params)
    updates = [
        optimizer.update({"kernel": jnp.full((2, 2), size)}, state, params)[0]["kernel"]
        for size in (2.0, 200.0)
    ]
    same = np.allclose(updates[0], updates[1], rtol=1e-5)
    assert same == (clip_norm > 0)


@pytest.mark.parametrize("samples", [2**31 - 1, 2**31, 2**33, 34_000_000_000])
@pytest.mark.parametrize("batch_size", [16, 32_768])
def test_schedules_go_on_past_the_integers_of_the_device(samples, batch_size):
    config = small_config()
    config.samples, config.batch_size = samples, batch_size
    config.optimizer.warmup_samples = warmup = samples // 4
    steps = np.array([0, *(samples // batch_size * np.array([1, 3, 5, 7, 8]) // 8 - 1)], np.int32)
    schedule = jax.jit(jax.vmap(optimizers.learning_rate(config)))
    seen = (steps.astype(np.float64) + 1) * batch_size
    progress = np.clip((seen - warmup) / (samples - warmup), 0, 1)
    shares = np.minimum(seen / warmup, 1) * 0.5 * (1 + np.cos(np.pi * progress))
    rates = np.asarray(schedule(jnp.asarray(steps))) / config.optimizer.learning_rate
    np.testing.assert_allclose(rates, shares, rtol=1e-5, atol=1e-6)
