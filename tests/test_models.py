"""Encoders and heads: shapes, types, and what must not change an answer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.registry import LOSSES
from mlip_jax.core.validation import validate
from mlip_jax.models import building, vit
from mlip_jax.models.layers import PatchEmbedding
from mlip_jax.models.text import TextEncoder
from mlip_jax.objectives import perspectives
from mlip_jax.recipes import sizes
from mlip_jax.training.summary import token_words

BATCH, PATCHES, WIDTH, CONTEXT = 2, 16, 16, 8
START, END, VOCABULARY = 30, 31, 32
TOKEN_IDS = np.array([[30, 3, 4, 5, 31, 0, 0, 0], [30, 7, 31, 0, 0, 0, 0, 0]], np.int32)


def small_config(**changes):
    """MLIP with all four perspectives: 16 patches, 1 frequency and 3 spatial blocks."""
    config = schema.default()
    image, text = config.model.image, config.model.text
    image.image_size, image.patch_size, image.width, image.depth, image.heads = 16, 4, WIDTH, 4, 2
    image.frequency.depth = 1
    image.merging.rate = 0.5
    text.context_length, text.width, text.depth, text.heads = CONTEXT, WIDTH, 1, 2
    config.model.embed_dim, config.model.token_dim = 8, 6
    for view in schema.IMAGE_VIEWS:
        config.perspectives[view].weight = 1.0
    config.perspectives.frequency_tokens.loss = "jsd"
    config.perspectives.frequency_global.loss = "sigmoid"
    config.perspectives.frequency_global.init_bias = -3.0
    config.perspectives.spatial_global.init_scale = 10.0
    config.update_from_flattened_dict(changes)
    validate(config)
    return config


def build(config):
    return building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)


def stirred(params):
    """Away from the start, where biases are 0 and filters small."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noise = [0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return tree.unflatten([np.asarray(leaf) + n for leaf, n in zip(leaves, noise, strict=True)])


@functools.cache
def initial_parameters():
    model = build(small_config())
    init = jax.jit(lambda: model.init(jax.random.key(0), images(), token_ids())["params"])
    return init()


@functools.cache
def parameters():
    return stirred(initial_parameters())


def images():
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 16, 16, 3)), jnp.float32)


def token_ids():
    return jnp.asarray(TOKEN_IDS)


@functools.cache
def encode(**changes):
    """The image views of `small_config`'s model with changes under model.image, as numpy."""
    dtype = changes.pop("compute_dtype", "float32")
    changes = {f"model.image.{key}": value for key, value in changes.items()}
    model = build(small_config(compute_dtype=dtype, **changes))
    run = jax.jit(lambda params, images: model.bind({"params": params}).inspect_images(images))
    return jax.device_get(run(parameters(), images()))


def merging(**changes):
    """Changes under model.image.merging, for `encode`."""
    return encode(**{f"merging.{key}": value for key, value in changes.items()})


@pytest.mark.parametrize(
    "changes",
    [{"guidance": name} for name in ("none", "spatial", "frequency", "contrast+received")]
    + [{"schedule": spread} for spread in ("even", "early", "0,3,1")],
    ids=str,
)
def test_every_guidance_and_schedule_merges_exactly(changes):
    """The same parameters serve every rate, guidance and schedule."""
    views = merging(**changes)
    left = PATCHES - round(0.5 * PATCHES)
    assert views.sizes.shape == (BATCH, left)
    assert views.spatial_tokens.shape == (BATCH, left, WIDTH)
    np.testing.assert_array_equal(views.sizes.sum(axis=1), PATCHES)
    # Which patches: a partition.
    assert views.source.shape == (BATCH, left, PATCHES)
    np.testing.assert_array_equal(views.source.sum(axis=1), 1.0)
    np.testing.assert_array_equal(views.source.sum(axis=2), views.sizes)
    if changes.get("guidance") == "none":
        assert views.importance is None
    else:
        assert views.importance.shape[0] == BATCH
        assert views.importance.min() >= 0 and views.importance.max() <= 1
    assert all(np.isfinite(view).all() for view in jax.tree.leaves(views))


@pytest.mark.parametrize("guidance", ["none", "both"])
def test_sizes_sum_to_the_patches_after_every_block(guidance):
    model = build(small_config(**{"model.image.merging.guidance": guidance}))
    capture = functools.partial(
        model.apply, capture_intermediates=lambda module, _: isinstance(module, vit.SpatialBlock)
    )
    _, state = jax.jit(capture)({"params": parameters()}, images(), token_ids())
    blocks = state["intermediates"]["image_encoder"]
    counts = building.merge_counts(small_config())
    left = PATCHES
    for index, r in enumerate(counts):
        left -= r
        tokens, size, features, *_ = blocks[f"spatial_{index}"]["__call__"][0]
        assert tokens.shape == (BATCH, 1 + left, WIDTH)
        assert features.shape == (BATCH, left, WIDTH)
        np.testing.assert_array_equal(np.sum(size, axis=1), 1 + PATCHES)
        np.testing.assert_array_equal(size[:, 0], 1.0)


def test_rate_0_is_no_merging_bit_for_bit():
    """Guidance and the rest of merging leave no trace when nothing merges."""
    views, other = merging(rate=0.0), merging(rate=0.0, guidance="none")
    assert views.source is None and views.spatial_tokens.shape == (BATCH, PATCHES, WIDTH)
    for name in ("spatial_global", "spatial_tokens", "frequency_global", "frequency_tokens"):
        np.testing.assert_array_equal(getattr(views, name), getattr(other, name), err_msg=name)
    merged = merging(schedule="even")
    # The Frequency Stage is before all merging; the Spatial Stage is not.
    np.testing.assert_allclose(merged.frequency_tokens, views.frequency_tokens, rtol=1e-5)
    assert np.abs(merged.spatial_global - views.spatial_global).max() > 1e-4


def test_no_merging_is_a_plain_vit():
    """Attention and MLP by hand, from the same parameters."""
    params = parameters()["image_encoder"]
    views = merging(rate=0.0)

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def gelu(x):
        return np.asarray(jax.nn.gelu(x, approximate=False))

    patches = np.asarray(images()).reshape(BATCH, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    x = linear(patches.reshape(BATCH, 4, 4, 48), params["patch_embedding"]["patch"])
    x = x + params["position"]
    block = params["frequency_0"]
    gain = block["filter"][..., 0] + 1j * block["filter"][..., 1]
    spectrum = np.fft.rfft2(norm(x, block["norm_filter"]), axes=(1, 2)) * gain
    y = norm(np.fft.irfft2(spectrum, s=(4, 4), axes=(1, 2)), block["norm_mlp"])
    x = x + linear(gelu(linear(y, block["mlp"]["up"])), block["mlp"]["down"])
    x = x.reshape(BATCH, PATCHES, WIDTH)
    frequency = norm(x, params["norm_frequency"])
    np.testing.assert_allclose(views.frequency_tokens, frequency, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(views.frequency_global, frequency.mean(1), rtol=1e-3, atol=1e-4)
    x = np.concatenate([np.broadcast_to(params["class_token"], (BATCH, 1, WIDTH)), x], axis=1)
    for index in range(3):
        block = params[f"spatial_{index}"]
        qkv = linear(norm(x, block["norm_attention"]), block["attention"]["qkv"])
        q, k, v = qkv.reshape(BATCH, 17, 3, 2, 8).transpose(2, 0, 3, 1, 4)
        weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(8))
        out = (weights / weights.sum(-1, keepdims=True)) @ v
        out = out.swapaxes(1, 2).reshape(BATCH, 17, WIDTH)
        x = x + linear(out, block["attention"]["out"])
        y = norm(x, block["norm_mlp"])
        x = x + linear(gelu(linear(y, block["mlp"]["up"])), block["mlp"]["down"])
    x = norm(x, params["norm_spatial"])
    np.testing.assert_allclose(views.spatial_global, x[:, 0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(views.spatial_tokens, x[:, 1:], rtol=1e-3, atol=1e-4)


def test_proportional_attention_counts_only_merged_tokens():
    off, on = merging(schedule="even"), merging(proportional_attention=True)
    assert np.abs(off.spatial_global - on.spatial_global).max() > 1e-5
    off, on = merging(rate=0.0), merging(rate=0.0, proportional_attention=True)
    np.testing.assert_allclose(off.spatial_global, on.spatial_global, rtol=1e-4, atol=1e-6)


def forward_and_loss(config):
    """Embeddings and the total loss with its gradient, as one program."""
    model, terms = build(config), perspectives.terms(config)

    def loss_fn(params, images, token_ids):
        embeddings, scales, biases = model.apply({"params": params}, images, token_ids)
        samples = jnp.float32(0)
        total, losses = perspectives.total_loss(terms, embeddings, scales, biases, samples, chunk=2)
        return total, (losses, embeddings, scales, biases)

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_of_a_whole_forward_without_silent_promotion(dtype, monkeypatch):
    for norm in (nn.LayerNorm, nn.GroupNorm):
        # Flax's own arithmetic mixes bfloat16 with float32 statistics; ours does not.
        lenient = jax.numpy_dtype_promotion("standard")(norm.__call__)
        monkeypatch.setattr(norm, "__call__", lenient)
    config = small_config(compute_dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        (total, (losses, embeddings, scales, biases)), gradient = forward_and_loss(config)(
            parameters(), images(), token_ids()
        )
    shapes = {
        "spatial_global": (BATCH, 8),
        "frequency_global": (BATCH, 8),
        "spatial_tokens": (BATCH, PATCHES // 2, 6),
        "frequency_tokens": (BATCH, PATCHES, 6),
        "sizes": (BATCH, PATCHES // 2),
        "text_global": (BATCH, 8),
        "text_tokens": (BATCH, CONTEXT, 6),
    }
    assert embeddings["text_mask"].dtype == bool
    assert embeddings.keys() == shapes.keys() | {"text_mask"}
    for name, shape in shapes.items():
        assert embeddings[name].shape == shape and embeddings[name].dtype == jnp.float32, name
        if name != "sizes":
            norms = np.linalg.norm(embeddings[name], axis=-1)
            np.testing.assert_allclose(norms, 1.0, rtol=1e-5, err_msg=name)
    assert set(losses) == set(scales) == set(schema.IMAGE_VIEWS) and set(biases) == {
        "frequency_global"
    }
    for scalar in (total, *losses.values(), *scales.values(), *biases.values()):
        assert scalar.shape == () and scalar.dtype == jnp.float32 and np.isfinite(scalar)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all(), path
        # Every parameter learns, but for the keys' bias, which no softmax sees, in full precision.
        assert np.abs(leaf).max() > 0, path


def test_views_keep_the_compute_type():
    views = jax.eval_shape(
        lambda params: (
            build(small_config(compute_dtype="bfloat16"))
            .bind({"params": params})
            .inspect_images(images())
        ),
        parameters(),
    )
    for name in ("spatial_global", "spatial_tokens", "frequency_tokens"):
        assert getattr(views, name).dtype == jnp.bfloat16, name
    for name in ("sizes", "frequency_global", "source", "importance"):
        assert getattr(views, name).dtype == jnp.float32, name


def test_bfloat16_is_near_float32():
    one = merging(rate=0.0).spatial_global
    other = encode(**{"merging.rate": 0.0, "compute_dtype": "bfloat16"}).spatial_global
    assert 0 < np.abs(one - other.astype(np.float32)).max() < 0.2


def test_only_what_a_perspective_uses_is_built():
    config = small_config()
    for view in ("spatial_tokens", "frequency_tokens", "frequency_global"):
        config.perspectives[view].weight = 0.0
    model = build(config)
    embeddings, scales, biases = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images(), token_ids())[0]
    )
    assert set(embeddings) == {"spatial_global", "sizes", "text_global", "text_mask"}
    assert set(scales) == {"spatial_global"} and not biases


def test_scales_start_where_the_config_says():
    params = initial_parameters()
    np.testing.assert_allclose(params["log_scale_spatial_global"], np.log(10), rtol=1e-6)
    np.testing.assert_allclose(params["log_scale_spatial_tokens"], -np.log(0.07), rtol=1e-6)
    np.testing.assert_allclose(params["bias_frequency_global"], -3.0)
    # A second compilation after the first step is what a weak type would cost.
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))


def test_a_rate_out_of_reach_is_refused_when_the_model_is_built():
    config = small_config(**{"model.image.merging.rate": 0.95, "model.image.depth": 2})
    with pytest.raises(UserError, match="largest rate here is 0.5"):
        build(config)


def test_a_convolutional_stem_gives_the_same_grid():
    stem = PatchEmbedding(WIDTH, 4, "conv", jnp.dtype("bfloat16"))
    grid, _ = jax.jit(stem.init_with_output)(jax.random.key(0), images())
    assert grid.shape == (BATCH, 4, 4, WIDTH) and grid.dtype == jnp.bfloat16
    assert np.isfinite(grid.astype(np.float32)).all()
    model = build(small_config(**{"model.image.stem": "conv"}))
    embeddings, _, _ = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images(), token_ids())[0]
    )
    assert embeddings["frequency_tokens"].shape == (BATCH, PATCHES, 6)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_the_last_pixels_that_fill_no_patch_are_not_seen(stem):
    whole = images()
    wider = jnp.pad(whole, ((0, 0), (0, 3), (0, 3), (0, 0)), constant_values=9.0)
    model = build(small_config(**{"model.image.stem": stem}))
    wider_model = build(small_config(**{"model.image.stem": stem, "model.image.image_size": 19}))
    variables = jax.jit(model.init)(jax.random.key(0), whole, token_ids())
    expected, _, _ = jax.jit(model.apply)(variables, whole, token_ids())
    embeddings, _, _ = jax.jit(wider_model.apply)(variables, wider, token_ids())
    for view, values in expected.items():
        np.testing.assert_array_equal(embeddings[view], values)


def test_what_is_not_seen_is_described():
    config = small_config(**{"model.image.image_size": 19})
    assert (building.grid(config), building.seen(config)) == (4, 16)
    words = building.image_encoder(config).describe(config)
    assert words.endswith("19 px in patches of 4, the last 3 not seen")
    assert token_words(config) == (
        "16 patches, 8 after merging; the last 3 of 19 pixels a side fill no patch"
    )
    words = building.image_encoder(small_config()).describe(small_config())
    assert words.endswith("16 px in patches of 4")
    assert token_words(small_config()) == "16 patches, 8 after merging"


def test_dropout_and_stochastic_depth_follow_their_key():
    model = build(small_config(**{"model.image.drop_path": 0.5, "model.text.dropout": 0.2}))
    run = jax.jit(
        lambda params, key: model.apply(
            {"params": params}, images(), token_ids(), deterministic=False, rngs={"dropout": key}
        )[0]
    )
    one, same, other = (run(parameters(), jax.random.key(seed)) for seed in (0, 0, 1))
    for view in ("spatial_global", "text_global"):
        np.testing.assert_array_equal(one[view], same[view])
        assert np.abs(one[view] - other[view]).max() > 1e-4, view


@functools.cache
def text_encoder(causal, pooling):
    encoder = TextEncoder(
        vocab_size=VOCABULARY,
        start_id=START,
        end_id=END,
        context_length=CONTEXT,
        width=WIDTH,
        depth=2,
        heads=2,
        mlp_ratio=2.0,
        causal=causal,
        pooling=pooling,
        activation="quick_gelu",
        dropout=0.0,
        drop_path=0.0,
        dtype=jnp.dtype("float32"),
    )
    params = stirred(jax.jit(encoder.init)(jax.random.key(0), token_ids())["params"])
    apply = jax.jit(encoder.apply)
    return lambda token_ids: jax.device_get(apply({"params": params}, token_ids))


TEXT_ENCODERS = [(True, "last"), (False, "last"), (False, "mean")]


@pytest.mark.parametrize(("causal", "pooling"), TEXT_ENCODERS)
def test_what_follows_the_end_of_a_text_does_not_matter(causal, pooling):
    encode_text = text_encoder(causal, pooling)
    views = encode_text(TOKEN_IDS)
    other = TOKEN_IDS.copy()
    other[0, 5:], other[1, 3:] = [9, 31, 8], 31
    again = encode_text(other)
    np.testing.assert_array_equal(views.text_global, again.text_global)
    np.testing.assert_array_equal(views.mask, again.mask)
    np.testing.assert_array_equal(views.text_tokens[views.mask], again.text_tokens[views.mask])
    # Words are what stands between start and end.
    np.testing.assert_array_equal(views.mask, (np.arange(8) > 0) & (np.arange(8) < [[4], [2]]))


@pytest.mark.parametrize(("causal", "pooling"), TEXT_ENCODERS)
def test_pooling(causal, pooling):
    views = text_encoder(causal, pooling)(TOKEN_IDS)
    if pooling == "last":
        expected = views.text_tokens[[0, 1], [4, 2]]
    else:
        expected = [views.text_tokens[0, 1:5].mean(axis=0), views.text_tokens[1, 1:3].mean(axis=0)]
    np.testing.assert_allclose(views.text_global, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_word_sees_nothing_after_it(causal):
    encode_text = text_encoder(causal, "last")
    other = TOKEN_IDS.copy()
    other[0, 3] = 12
    one, two = encode_text(TOKEN_IDS).text_tokens[0], encode_text(other).text_tokens[0]
    before = np.abs(one[:3] - two[:3]).max()
    assert before == 0 if causal else before > 1e-4
    assert np.abs(one[3:5] - two[3:5]).max() > 1e-4


@pytest.mark.parametrize("size", sizes.SIZES)
def test_every_named_size_is_a_valid_model(size):
    config = schema.default()
    sizes.apply(config, size)
    validate(config)
    assert build(config).embed_dim == config.model.embed_dim


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'B/16'"):
        sizes.apply(schema.default(), "B16")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("text", ["clip", "bert"])
@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_any_encoders_go_together_under_any_loss(image, text, loss):
    config = schema.default()
    config.model.image.architecture, config.model.text.architecture = image, text
    config.model.image.image_size, config.model.text.context_length = 16, CONTEXT
    if image == "resnet":
        config.model.image.depth, config.model.image.width, config.model.image.stem = 18, 4, "small"
    for view in ("spatial_global", "spatial_tokens"):
        config.perspectives[view].weight, config.perspectives[view].loss = 1.0, loss
    validate(config)
    model, terms = build(config), perspectives.terms(config)

    def total(variables):
        results, _ = model.apply(
            variables, images(), token_ids(), deterministic=False, mutable=["batch_stats"]
        )
        return perspectives.total_loss(terms, *results, jnp.float32(0))

    variables = jax.eval_shape(lambda: building.initialise(model, config, jax.random.key(0)))
    loss, losses = jax.eval_shape(total, variables)
    assert loss.shape == () and losses.keys() == {"spatial_global", "spatial_tokens"}
    gradients = jax.eval_shape(jax.grad(lambda *a: total(*a)[0]), variables)
    assert jax.tree.structure(gradients) == jax.tree.structure(variables)
