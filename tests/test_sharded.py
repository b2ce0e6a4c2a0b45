"""Losses over all pairs, in blocks around a ring: those of one device, in little memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_losses import token_loss

from mlip_jax.devices import parallel
from mlip_jax.objectives import contrastive, losses, perspectives, ring, sharded

BATCH = 16
MIB = 2**20
LOSSES = ("softmax", "sigmoid", "jsd")


def make_mesh(data, fsdp=1, tensor=1):
    return jax.make_mesh(
        (data, fsdp, tensor),
        parallel.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[: data * fsdp * tensor],
    )


def arguments():
    """By loss; one of the texts has no words."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, (BATCH, 5)).astype(np.float32)
    scalars = {"scale": np.float32(9.0), "bias": np.float32(-4.0)}
    globals_ = {"image": unit(rng, BATCH, 8), "text": unit(rng, BATCH, 8), **scalars}
    tokens = {
        "image_tokens": unit(rng, BATCH, 5, 6),
        "text_tokens": unit(rng, BATCH, 4, 6),
        "image_weights": sizes / sizes.sum(axis=1, keepdims=True),
        "text_mask": np.arange(4) < rng.integers(0, 5, (BATCH, 1)),
        **scalars,
    }
    assert not tokens["text_mask"].any(axis=1).all()
    return dict.fromkeys(LOSSES, globals_) | {f"{loss}_tokens": tokens for loss in LOSSES}


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def in_blocks(mesh):
    """Every loss as a function of a dict of arguments."""
    tokens = functools.partial(token_loss, chunk=3, shifts=2, blocks="always", mesh=mesh)
    return {
        "softmax": lambda a: sharded.softmax_contrastive(
            a["image"], a["text"], a["scale"], mesh=mesh
        ),
        "sigmoid": lambda a: sharded.sigmoid_contrastive(**a, mesh=mesh),
        "jsd": lambda a: sharded.jsd(a["image"], a["text"], a["scale"], 2, mesh=mesh),
    } | {f"{loss}_tokens": lambda a, loss=loss: tokens(loss, **a) for loss in LOSSES}


def plain():
    """The same on one device, all scores at once."""
    tokens = functools.partial(token_loss, chunk=3, shifts=2)
    return {
        "softmax": lambda a: contrastive.softmax_contrastive(a["image"], a["text"], a["scale"]),
        "sigmoid": lambda a: contrastive.sigmoid_contrastive(**a),
        "jsd": lambda a: contrastive.jsd(a["image"], a["text"], a["scale"], 2),
    } | {f"{loss}_tokens": lambda a, loss=loss: tokens(loss, **a) for loss in LOSSES}


def values_and_gradients(functions, inputs, mesh=None):
    """Of every function, with its arguments' rows on the mesh; the mask has no gradient."""
    if mesh is not None:
        inputs = jax.tree.map(lambda x: jax.device_put(x, placement(x, mesh)), inputs)

    def all_of_them(inputs):
        results = {}
        for name, function in functions.items():
            fixed = {k: v for k, v in inputs[name].items() if k == "text_mask"}
            learned = {k: v for k, v in inputs[name].items() if k != "text_mask"}
            results[name] = jax.value_and_grad(lambda x, f=function, k=fixed: f(x | k))(learned)
        return results

    return jax.jit(all_of_them)(inputs)


def placement(x, mesh):
    return parallel.batch_sharding(mesh) if np.ndim(x) else parallel.replicated(mesh)


def assert_same(actual, expected, rtol=1e-5):
    """Entries near 0 are differences of larger ones: measured against the whole gradient too."""
    for name in expected:
        for a, b in zip(
            *(jax.tree.leaves(jax.device_get(x[name])) for x in (actual, expected)), strict=True
        ):
            a, b = np.float32(a), np.float32(b)
            room = rtol / 10 * np.abs(b).max()
            np.testing.assert_allclose(a, b, rtol=rtol, atol=room, err_msg=name)


@functools.cache
def expected():
    return values_and_gradients(plain(), arguments())


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        (None, 4 * BATCH),
        ((1, 1, 1), ring.TILE),
        ((2, 1, 1), 8 * 3),  # of 8 texts; 3 do not divide them, 2 do
        ((4, 1, 1), ring.TILE),
        ((2, 4, 1), ring.TILE),
        ((2, 2, 2), ring.TILE),
    ],
)
def test_value_and_gradient_are_those_of_one_device(shape, tile, monkeypatch):
    monkeypatch.setattr(ring, "TILE", tile)
    mesh = make_mesh(*shape) if shape else None
    actual = values_and_gradients(in_blocks(mesh), arguments(), mesh)
    assert_same(actual, expected())
    for name in ("softmax_tokens", "sigmoid_tokens"):  # the text without words
        mask, gradient = arguments()[name]["text_mask"], actual[name][1]["text_tokens"]
        np.testing.assert_array_equal(gradient[~mask], 0.0)
    if mesh:
        rows = parallel.batch_sharding(mesh)
        assert actual["softmax"][1]["text"].sharding.is_equivalent_to(rows, 2)


def test_bfloat16_is_computed_in_float32():
    def cast(inputs, dtype):
        rows = ("image", "text", "image_tokens", "text_tokens")
        return {
            name: {k: jnp.asarray(v, dtype) if k in rows else v for k, v in arrays.items()}
            for name, arrays in inputs.items()
        }

    mesh = make_mesh(2)
    rounded = cast(arguments(), jnp.bfloat16)
    wide = values_and_gradients(plain(), cast(rounded, jnp.float32))
    for functions, where in ((in_blocks(mesh), mesh), (plain(), None)):
        actual = values_and_gradients(functions, rounded, where)
        for name, (value, gradient) in actual.items():
            assert value.dtype == jnp.float32
            np.testing.assert_allclose(value, wide[name][0], rtol=1e-5, err_msg=name)
            first = gradient["image_tokens" if name.endswith("tokens") else "image"]
            assert first.dtype == jnp.bfloat16
        # The gradient is rounded to the embeddings' type: the last of its 8 bits.
        assert_same(actual, wide, rtol=2**-7)


def test_scores_in_the_thousands_do_not_overflow():
    mesh = make_mesh(2)
    inputs = {"softmax": arguments()["softmax"] | {"scale": np.float32(3000.0)}}
    actual, one = (
        values_and_gradients({"softmax": functions["softmax"]}, inputs, where)
        for functions, where in ((in_blocks(mesh), mesh), (plain(), None))
    )
    assert np.isfinite(actual["softmax"][0])
    assert_same(actual, one, rtol=1e-3)  # float32 cosines, times 3000, in an exponential


def test_tiles_are_equal_and_the_largest():
    assert [ring._tiles(rows, 4) for rows in (1, 4, 5, 6, 8, 12)] == [1, 1, 5, 2, 2, 3]


@functools.cache
def program(loss, batch, devices):
    """The compiled value and gradient of a global loss, 512 wide."""
    mesh = make_mesh(devices)
    rows = jax.ShapeDtypeStruct((batch, 512), jnp.float32, sharding=parallel.batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=parallel.replicated(mesh))
    inputs = {"image": rows, "text": rows, "scale": scalar, "bias": scalar}
    step = jax.jit(jax.value_and_grad(in_blocks(mesh)[loss]))
    return step.lower(inputs).compile()


def temporary(loss, batch, devices):
    return program(loss, batch, devices).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_8192_pairs_on_8_devices_take_20_mib_of_each_and_no_gather(loss):
    assert temporary(loss, 8192, 8) <= 20 * MIB
    text = program(loss, 8192, 8).as_text()
    assert "collective-permute" in text
    assert not re.search("all-gather|all-to-all", text)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_memory_grows_with_a_device_s_rows_not_with_the_batch(loss):
    memory = temporary(loss, 4096, 8)
    # Half as many rows on each device: between a half, its rows, and a quarter, its scores.
    assert 0.25 * memory < temporary(loss, 2048, 8) < 0.5 * memory
    # As many rows on each device, and fewer devices.
    np.testing.assert_allclose(temporary(loss, 2048, 4), memory, rtol=0.01)
    # Past a tile the scores take no more, and the rows twice as much.
    assert temporary(loss, 16384, 8) < 2.2 * temporary(loss, 8192, 8)


def test_scores_of_many_pairs_are_computed_in_blocks():
    mesh = make_mesh(8)
    for matrices, where, devices in ((1, mesh, 8), (2, mesh, 8), (1, None, 1)):
        # The largest batch whose scores the plain form may hold.
        most = int((losses.PLAIN_BYTES * devices / matrices / 4) ** 0.5) // 8 * 8
        assert not losses.in_blocks("auto", most, matrices, where)
        assert losses.in_blocks("auto", most + 8, matrices, where)
    assert losses.in_blocks("always", 2, 1, None)
    assert not losses.in_blocks("never", 2**20, 2, mesh)


@pytest.mark.parametrize("view", ["spatial_global", "spatial_tokens"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_perspective_is_computed_the_way_that_is_asked_for(view, loss):
    mesh = make_mesh(2)
    inputs = arguments()
    globals_, tokens = inputs["softmax"], inputs["softmax_tokens"]
    embeddings = {
        "spatial_global": globals_["image"],
        "text_global": globals_["text"],
        "spatial_tokens": tokens["image_tokens"],
        "text_tokens": tokens["text_tokens"],
        "text_mask": tokens["text_mask"],
        "sizes": tokens["image_weights"],
    }
    term = perspectives.Term(view, loss, 1.0, 1, 0)

    def total(embeddings, scale, blocks):
        scales, biases, samples_seen = {view: scale}, {view: scale - 10.0}, jnp.float32(0)
        return perspectives.total_loss(
            (term,), embeddings, scales, biases, samples_seen, blocks=blocks, mesh=mesh
        )[0]

    for blocks, travels in (("always", True), ("never", False), ("auto", False)):
        traced = jax.make_jaxpr(functools.partial(total, blocks=blocks))(embeddings, np.float32(9))
        assert ("ppermute" in str(traced)) == travels
        assert not traced.consts
