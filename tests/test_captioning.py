"""The caption decoder: its losses, on any mesh and in parts alike, and what it refuses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from test_step import BATCH, END, START, VOCABULARY, assert_same, batch, small_config

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.devices import parallel
from mlip_jax.models import building, captioning
from mlip_jax.models.captioning import CaptionDecoder
from mlip_jax.models.vit import ImageViews
from mlip_jax.objectives.perspectives import mean_of_all
from mlip_jax.training.state import abstract_state, initial_state
from mlip_jax.training.step import lower_step, make_train_step
from mlip_jax.training.step_cost import step_flops

WIDTH, HEADS, DEPTH = 8, 2, 1
IDS = np.array([[30, 3, 4, 5, 31, 0], [30, 7, 31, 0, 0, 0], [30, 31, 0, 0, 0, 0]], np.int32)


def decoder(**changes):
    fields = {
        "vocab_size": 32,
        "start_id": 30,
        "end_id": 31,
        "context_length": 6,
        "width": WIDTH,
        "depth": DEPTH,
        "heads": HEADS,
        "mlp_ratio": 2.0,
        "activation": "gelu",
        "dropout": 0.0,
        "queries": 0,
        "parallel": 0.0,
        "dtype": jnp.dtype("float32"),
    }
    return CaptionDecoder(**fields | changes)


@functools.cache
def views():
    """Images of four tokens, some of them merged ones."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 4, 12)).astype(np.float32)
    sizes = np.array([[1, 1, 1, 1], [3, 1, 1, 5], [2, 2, 1, 1]], np.float32)
    return ImageViews(jnp.asarray(tokens[:, 0]), jnp.asarray(tokens), jnp.asarray(sizes))


def parameters(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), views(), None, IDS)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)


# The reference: one caption after the other, one place after the other, in numpy.


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def attention(q, k, v, bias):
    """Of queries and keys in heads; `bias` [queries, keys] is added to the logits."""
    heads = []
    for of_q, of_k, of_v in zip(*(np.split(x, HEADS, -1) for x in (q, k, v)), strict=True):
        weights = np.exp(of_q @ of_k.T / math.sqrt(of_q.shape[-1]) + bias)
        heads.append(weights / weights.sum(-1, keepdims=True) @ of_v)
    return np.concatenate(heads, axis=-1)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def looked_up(x, p, tokens, size):
    k, v = np.split(linear(tokens, p["key_value_projection"]), 2, axis=-1)
    return linear(attention(linear(x, p["query_projection"]), k, v, np.log(size)[None]), p["out"])


def reference(params, image, row, ids, all_at_once=False):
    """The sum of the losses of a caption, without padding: [start, words..., end]."""
    tokens, size = np.asarray(image.spatial_tokens[row], np.float64), np.asarray(image.sizes[row])
    tokens = norm(tokens, params["norm_image"])
    if "pooler" in params:
        p = params["pooler"]
        probes = norm(p["probes"], p["norm_probes"])
        tokens = norm(looked_up(probes, p["attention"], tokens, size), p["norm"])
        size = np.ones(len(tokens))
    inputs, labels = ids[:-1], ids[1:]
    x = np.asarray(params["embedding"], np.float64)[inputs]
    hidden = np.where(np.tril(np.ones((len(x), len(x)))) > 0, 0.0, -np.inf)
    if all_at_once:
        x, hidden = np.tile(params["mask_token"], (len(x), 1)).astype(np.float64), 0.0
    x = x + params["position"][: len(x)]
    for layer in range(DEPTH):
        p = params[f"block_{layer}"]
        q, k, v = np.split(linear(norm(x, p["norm_attention"]), p["qkv"]), 3, axis=-1)
        x = x + linear(attention(q, k, v, hidden), p["out"])
        x = x + looked_up(norm(x, p["norm_image"]), p["image"], tokens, size)
        y = gelu(linear(norm(x, p["norm_mlp"]), p["mlp"]["up"]))
        x = x + linear(y, p["mlp"]["down"])
    logits = norm(x, params["norm"]) @ np.asarray(params["embedding"], np.float64).T
    right = logits[np.arange(len(labels)), labels]
    return float((np.log(np.exp(logits).sum(-1)) - right).sum())


@functools.cache
def of_one_block(queries):
    """A decoder of one block, its variables, and its losses of captions as a function."""
    module = decoder(queries=queries, parallel=0.5)
    variables = parameters(module)

    @jax.jit
    def losses(image, ids, key):
        plain = module.apply(variables, image, None, ids)
        rngs = {"dropout": key}
        drawn = module.apply(variables, image, None, ids, deterministic=False, rngs=rngs)
        return *plain, drawn[0]

    def called(ids=IDS, image=None, seed=0):
        return jax.device_get(losses(image or views(), ids, jax.random.key(seed)))

    return module, variables, called


@pytest.mark.parametrize("queries", [0, 3])
def test_it_is_the_formula_with_padding_left_out_and_merged_tokens_weighed(queries):
    _, variables, losses = of_one_block(queries)
    sums, counts, _ = losses()
    assert counts.tolist() == [4, 2, 1] and counts.dtype == np.int32
    for row, length in enumerate((5, 3, 2)):
        expected = reference(variables["params"], views(), row, IDS[row, :length])
        np.testing.assert_allclose(sums[row], expected, rtol=1e-4)
    alike = views()._replace(sizes=jnp.ones_like(views().sizes))
    changed = abs(losses(image=alike)[0] - sums)
    assert changed[0] < 1e-5 and changed[1:].min() > 1e-4


def test_what_comes_after_the_end_changes_nothing():
    padded = IDS.copy()
    padded[1, 3:], padded[2, 2:] = 9, 31
    for one, other in zip(of_one_block(0)[2]()[:2], of_one_block(0)[2](padded)[:2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_share_of_the_captions_is_predicted_at_once_from_masks_that_see_each_other():
    _, variables, losses = of_one_block(3)
    # A caption that fills the context: what else the places see is padding.
    ids = np.array([[30, 3, 4, 5, 6, 31]] * 3, np.int32)
    causal, at_once = (
        [reference(variables["params"], views(), row, ids[row], masked) for row in range(3)]
        for masked in (False, True)
    )
    draws = np.stack([losses(ids, seed=seed)[2] for seed in range(40)])
    masked = np.isclose(draws, at_once, rtol=1e-4)
    assert (masked ^ np.isclose(draws, causal, rtol=1e-4)).all()
    assert 0.35 < masked.mean() < 0.65  # of 120 draws


def test_texts_without_a_start_begin_with_their_end():
    inputs, labels, counted = captioning.shifted_right(jnp.asarray([[3, 4, 1, 1]]), -1, 1)
    assert inputs.tolist() == [[1, 3, 4, 1]] and labels.tolist() == [[3, 4, 1, 1]]
    assert counted.tolist() == [[True, True, True, False]]


def test_written_token_by_token_the_logits_are_those_of_the_whole_caption():
    module, variables, losses = of_one_block(3)
    sums = losses()[0]

    @jax.jit
    def by_token(ids):
        memory, size = module.apply(variables, views(), method="look")
        written = module.nothing_written(3)
        total = []
        for place in range(ids.shape[1] - 1):
            logits, written = module.apply(
                variables, ids[:, place], jnp.asarray(place), written, memory, size, method="write"
            )
            right = jnp.take_along_axis(logits, ids[:, place + 1, None], axis=1)[:, 0]
            total.append(jax.nn.logsumexp(logits, axis=-1) - right)
        return jnp.stack(total)

    by_place = np.asarray(by_token(IDS))
    for row, count in enumerate((4, 2, 1)):
        np.testing.assert_allclose(by_place[:count, row].sum(), sums[row], rtol=1e-5)


def test_in_bfloat16_the_losses_are_nearly_the_same_and_gradients_stay_float32():
    variables = of_one_block(0)[1]

    @jax.jit
    def summed(params, image):
        low = decoder(dtype=jnp.dtype("bfloat16"), remat=True)
        sums, counts = low.apply({"params": params}, image, None, jnp.asarray(IDS))
        return mean_of_all(sums, counts)

    loss, gradient = jax.value_and_grad(summed)(variables["params"], views())
    sums, counts, _ = of_one_block(0)[2]()
    np.testing.assert_allclose(loss, sums.sum() / counts.sum(), rtol=0.02)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}


def test_the_mean_is_over_the_tokens_of_the_whole_batch():
    sums, counts = jnp.asarray([6.0, 2.0]), jnp.asarray([3, 1], jnp.int32)
    assert mean_of_all(sums, counts) == 2.0  # and not 2 = the mean of 2 and 2 alone
    assert mean_of_all(jnp.asarray([6.0, 4.0]), counts) == 2.5
    assert mean_of_all(jnp.zeros(2), jnp.zeros(2, jnp.int32)) == 0.0


# The step.


def config_of(**changes):
    """A tiny CLIP with a decoder that drops, and predicts half of the captions at once."""
    config = small_config()
    config.model.image.frequency.depth, config.model.image.depth = 0, 1
    config.model.image.merging.rate = 0.0
    config.perspectives.frequency_global.weight = config.perspectives.spatial_tokens.weight = 0.0
    config.perspectives.caption.weight, config.perspectives.caption.parallel = 2.0, 0.5
    caption = config.model.caption
    caption.width, caption.depth, caption.heads, caption.dropout = 16, 1, 2, 0.1
    config.optimizer.ema = 0.0
    config.update_from_flattened_dict(changes)
    validate(config)
    return config


def network_of(config):
    return building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)


@functools.cache
def started(changes=(), shape=(1, 1, 1)):
    """The state at the start, and a step by an optimizer that subtracts the gradient."""
    config = config_of(**dict(changes))
    axes = ConfigDict(dict(zip(parallel.AXES, shape, strict=True)))
    mesh = parallel.make_mesh(axes, BATCH, jax.devices()[: math.prod(shape)])
    model, optimizer = network_of(config), optax.scale(-1.0)
    step = make_train_step(model, optimizer, config, Preprocessing.of(config), mesh)
    abstract = abstract_state(model, optimizer, config, mesh)
    compiled = lower_step(step, abstract, config, mesh).compile()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def run(state):
        placed = jax.device_put(state, shardings)
        return jax.device_get(compiled(placed, parallel.global_batch(batch(), mesh)))

    if changes or mesh.size > 1:
        return started()[0], run
    return jax.device_get(jax.jit(lambda: initial_state(model, optimizer, config))()), run


@functools.cache
def gradient_of(changes=(), shape=(1, 1, 1)):
    start, run = started(changes, shape)
    after, metrics = run(start)
    return metrics, jax.tree.map(np.subtract, start.params, after.params)


def assert_same_gradient(actual, expected):
    assert_same(actual[0], expected[0], rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    assert_same(actual[1], expected[1], rtol=1e-4, atol=1e-5 * scale)


def test_every_parameter_has_a_gradient_and_the_loss_its_weight():
    metrics, gradient = gradient_of()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, parallel.path_name(path)
    total = metrics["loss/spatial_global"] + 2 * metrics["loss/caption"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    assert abs(metrics["loss/caption"] - math.log(VOCABULARY)) < 0.5  # it knows nothing yet


@pytest.mark.slow
def test_on_a_mesh_it_is_the_gradient_of_one_device():
    assert_same_gradient(gradient_of((), (2, 2, 2)), gradient_of())


def test_in_parts_and_computed_again_it_is_the_gradient_of_the_whole_batch():
    words = (batch()["token_ids"] > 0).sum(axis=1).reshape(8, -1).sum(axis=1)
    assert len(set(words.tolist())) > 1  # the parts have different numbers of tokens
    again = dict.fromkeys(("model.caption.remat", "model.image.remat"), True)
    changes = (("accumulation", 2), *again.items())
    assert_same_gradient(gradient_of(changes, (2, 2, 1)), gradient_of())


def test_a_run_that_goes_on_from_what_was_kept_has_the_same_bits():
    start, run = started()
    first, _ = run(start)
    second, metrics = run(first)
    again, metrics_again = run(jax.tree.map(np.copy, first))
    assert_same(again, second)
    assert_same(metrics_again, metrics)
    other, _ = run(first.replace(step=np.int32(5)))  # another draw of what is masked and dropped
    kernels = [
        state.params["predictors_caption"]["block_0"]["qkv"]["kernel"] for state in (other, second)
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 0


def test_without_a_weight_there_is_no_decoder_and_all_else_starts_alike():
    config = config_of(**{"perspectives.caption.weight": 0.0})
    model = network_of(config)
    plain = jax.jit(lambda: building.initialise(model, config, jax.random.key(config.seed)))()
    with_decoder = started()[0].params
    assert with_decoder.keys() - plain["params"].keys() == {"predictors_caption"}
    assert_same(plain["params"], {name: with_decoder[name] for name in plain["params"]})


def test_its_work_is_counted():
    config = config_of()
    model, variables = network_of(config), {"params": started()[0].params}
    plain = model.clone(predictions={})
    work = step_flops(model, variables, config) - step_flops(plain, variables, config)
    places, tokens, width, image_width = 7, 16, 16, 32
    projections = places * width * width * (4 + 2 + 8) + tokens * image_width * 2 * width
    attention = 2 * places * width * (places + tokens)
    logits = places * width * VOCABULARY
    assert work == 3 * BATCH * 2 * (projections + attention + logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.caption.depth": 0}, "config.model.caption.depth=0 must be from 1 to 1,000"),
        ({"model.caption.heads": 3}, "config.model.caption.width=16 is not a multiple of heads=3"),
        ({"model.caption.mlp_ratio": 0.01}, "mlp_ratio=0.01 leaves nothing of the width 16"),
        ({"model.caption.queries": -1}, "config.model.caption.queries=-1 must be at least 0"),
        ({"model.caption.activation": "relu"}, "model.caption.activation='relu' is not one"),
        (
            {"perspectives.caption.parallel": 1.5},
            "perspectives.caption.parallel=1.5 must be",
        ),
        ({"perspectives.spatial_global.weight": 0.0}, "there is nothing to train on"),
    ],
)
def test_a_decoder_that_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        config_of(**changes)


def test_a_resnets_grid_is_its_tokens():
    config = schema.default()
    config.model.image.update({"architecture": "resnet", "depth": 18, "stem": "small", "width": 4})
    config.model.image.image_size = 16
    config.model.text.update({"context_length": 6, "width": 12})
    config.perspectives.caption.weight = 1.0
    validate(config)
    model = building.build(config, vocab_size=32, start_id=30, end_id=31)
    shapes = jax.eval_shape(lambda: building.initialise(model, config, jax.random.key(0)))
    kernel = shapes["params"]["predictors_caption"]["block_0"]["image"]["key_value_projection"]
    assert kernel["kernel"].shape == (32, 2 * config.model.caption.width)
