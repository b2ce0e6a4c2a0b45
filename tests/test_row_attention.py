"""Attention as one kernel for TPUs, interpreted here, against the plain form."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding

from mlip_jax.core import schema
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.devices import parallel
from mlip_jax.models import building
from mlip_jax.models.attention import attend
from mlip_jax.models.row_attention import LONGEST, attend_rows
from mlip_jax.planning import machines
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.state import abstract_state
from mlip_jax.training.step import lower_step, make_train_step

TOLERANCE = {"float32": 2e-6, "bfloat16": 0.01}  # relative, of the norm


def inputs(rows, tokens, width, dtype):
    """Queries, keys and values, a gradient, sizes, and lengths, one of them of a single token."""
    rng = np.random.default_rng(0)
    qkv, gradient = (
        jnp.asarray(rng.normal(size=(rows, tokens, columns)), dtype)
        for columns in (3 * width, width)
    )
    size = jnp.asarray(rng.integers(1, 5, (rows, tokens)), jnp.float32)
    lengths = jnp.asarray(rng.integers(1, tokens, rows), jnp.int32).at[0].set(1)
    return qkv, gradient, size, lengths


def forth_and_back(form, heads, causal, qkv, gradient, size, lengths):
    """The results of attention, and the gradient of all of them."""

    def loss(qkv):
        out, keys, first, received = attend(qkv, heads, form, causal, lengths, size)
        total = jnp.sum(out.astype(jnp.float32) * gradient) + jnp.sum(jnp.sin(keys))
        total += jnp.sum(jnp.sin(first)) + jnp.sum(jnp.sin(received))
        return total, (out, keys, first, received)

    gradient_of, results = jax.jit(jax.grad(loss, has_aux=True))(qkv)
    return gradient_of, *results


def assert_close(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        one, other = (np.asarray(array, np.float32) for array in (one, other))
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize(
    "dtype, tokens, width, heads, causal, sized, padded",
    [
        ("float32", 17, 128, 2, False, True, False),
        ("bfloat16", 50, 256, 2, True, False, True),  # a head fills the lanes
        ("float32", 9, 128, 4, False, False, False),
        ("float32", 5, 256, 1, True, True, True),  # a head is wider than the lanes
    ],
)
def test_it_is_the_plain_form(dtype, tokens, width, heads, causal, sized, padded):
    qkv, gradient, size, lengths = inputs(3, tokens, width, dtype)
    arguments = (heads, causal, qkv, gradient, size if sized else None, lengths if padded else None)
    actual, expected = (forth_and_back(form, *arguments) for form in ("pallas", "plain"))
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "tokens, width, heads, causal", [(197, 768, 12, False), (77, 512, 8, True)]
)
def test_it_is_the_plain_form_in_the_sizes_of_clip(tokens, width, heads, causal, dtype):
    qkv, gradient, size, lengths = inputs(2, tokens, width, dtype)
    arguments = (heads, causal, qkv, gradient, size, lengths if causal else None)
    actual, expected = (forth_and_back(form, *arguments) for form in ("pallas", "plain"))
    assert_close(actual, expected, TOLERANCE[dtype])


def test_each_device_attends_in_its_own_examples():
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, 8, jax.devices()[:4])
    qkv, _, size, _ = inputs(8, 5, 128, jnp.float32)
    bias = jnp.log(size)

    def loss(qkv, bias):
        return jnp.sum(jnp.sin(attend_rows(qkv, bias, 2, False)))

    def spread(qkv, bias):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(loss)(qkv, bias)

    rows = NamedSharding(mesh, parallel.BATCH)
    compiled = jax.jit(spread, out_shardings=None).lower(
        *(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for x in (qkv, bias))
    )
    actual = compiled.compile()(jax.device_put(qkv, rows), jax.device_put(bias, rows))
    assert actual[1].sharding.is_equivalent_to(rows, 3)
    expected = jax.jit(jax.value_and_grad(loss))(qkv, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_over_several_devices_runs_the_kernel_on_each(accumulation):
    config = schema.default()
    for tower in (config.model.image, config.model.text):
        tower.width, tower.heads, tower.depth = 128, 2, 1
    config.model.image.image_size, config.model.image.patch_size = 16, 8
    config.model.image.frequency.depth, config.model.text.context_length = 0, 4
    config.batch_size, config.accumulation = 8, accumulation
    config.samples, config.ring = 16, "always"
    config.perspectives.spatial_global.weight = 1.0
    validate(config)
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, 8, jax.devices()[:4])
    network = building.build(config, vocab_size=32, start_id=30, end_id=31)
    optimizer = optimizers.make(config)
    abstract = abstract_state(network, optimizer, config, mesh)
    trained = building.with_attention(network, {"image": "pallas", "text": "pallas"})
    step = make_train_step(trained, optimizer, config, Preprocessing.of(config), mesh)
    program = lower_step(step, abstract, config, mesh).as_text()
    assert f"tensor<{2 // accumulation}x5x384x" in program  # all that a device has, or a part of it


@pytest.mark.parametrize(
    "tokens, width, heads", [(LONGEST + 1, 128, 2), (5, 192, 3), (5, 384, 4), (5, 96, 1)]
)
def test_what_does_not_fit_the_lanes_or_the_memory_is_refused(tokens, width, heads):
    qkv = jax.ShapeDtypeStruct((2, tokens, 3 * width), jnp.float32)
    with pytest.raises(ValueError, match=f"at most {LONGEST} tokens .*, not {tokens} tokens"):
        jax.eval_shape(lambda qkv: attend_rows(qkv, None, heads, False), qkv)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
@pytest.mark.parametrize(
    "tokens, width, heads, causal", [(197, 768, 12, False), (77, 512, 8, True)]
)
def test_the_tpu_compiler_takes_it(tokens, width, heads, causal, topology):
    one = SingleDeviceSharding(machines.find(topology).devices[0])
    qkv, bias = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=one)
        for shape, dtype in [((8, tokens, 3 * width), jnp.bfloat16), ((8, tokens), jnp.float32)]
    )

    def forth_and_back(qkv, bias):
        out, pull = jax.vjp(lambda qkv: attend_rows(qkv, bias, heads, causal), qkv)
        return out, pull(out)

    text = jax.jit(forth_and_back).lower(qkv, bias).compile().as_text()
    assert text.count("tpu_custom_call") == 2
