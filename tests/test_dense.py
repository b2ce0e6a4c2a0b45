"""The dense layer: flax's, with its own products for CPUs in bfloat16."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.layers import Dense, add

RNG = np.random.default_rng(0)
SHAPES = [(4, 6), (2, 3, 6), (2, 3, 2, 6)]


def both(dtype, x, use_bias=True):
    """Output, and gradients to input and parameters: ours, flax's in float32."""
    x = jnp.asarray(x, dtype)
    ours = Dense(5, jnp.dtype(dtype), use_bias)
    theirs = nn.Dense(5, use_bias, dtype=jnp.float32)
    variables = ours.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    weight = jnp.asarray(RNG.normal(size=(*x.shape[:-1], 5)), jnp.float32)

    def loss(module, variables, x):
        y = module.apply(variables, x)
        return jnp.sum(y.astype(jnp.float32) * weight), y

    results = []
    for module, values in ((ours, x), (theirs, x.astype(jnp.float32))):
        gradient = jax.jit(
            jax.grad(lambda v, z, module=module: loss(module, v, z), argnums=(0, 1), has_aux=True)
        )
        results.append(gradient(variables, values))
    return results


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_in_float32_it_is_that_of_flax(shape, use_bias):
    ours, theirs = both("float32", RNG.normal(size=shape), use_bias)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_it_rounds_operands_and_results_alone(shape):
    (ours, y), (theirs, exact) = both("bfloat16", RNG.normal(size=shape))
    assert y.dtype == jnp.bfloat16 and y.shape == exact.shape
    assert ours[1].dtype == jnp.bfloat16  # the input's
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours[0])} == {"float32"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.03),
        (ours, y),
        (theirs, exact),
    )


def test_products_in_bfloat16_are_native():
    """Nothing is widened before a product: XLA's native ones take both operands as they are."""
    x, kernel = jnp.zeros((4, 8, 64), jnp.bfloat16), jnp.zeros((64, 32), jnp.bfloat16)
    layer = Dense(32, jnp.dtype("bfloat16"))

    def loss(kernel, x):
        y = layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(32)}}, x)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(kernel, x).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == 3
    for line in products:
        operands, result = line.rsplit(":", 1)[1].split("->")
        assert operands.count("bf16") == 2 and "xf32>" in result


def test_gradients_of_parameters_are_sums_in_float32():
    """257 ones: in bfloat16 they are 256."""
    layer, x = Dense(1, jnp.dtype("bfloat16")), jnp.ones((257, 1), jnp.bfloat16)
    params = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}

    def total(params, position):
        y = add(layer.apply({"params": params}, x), position)
        return jnp.sum(y.astype(jnp.float32))

    for gradient in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(params, jnp.zeros(1))):
        assert gradient.dtype == jnp.float32 and gradient.ravel() == 257


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_devices_sum_the_gradients_of_kernels_in_float32(platform):
    """What several devices add up has the type that the product has."""

    def loss(kernel, x):
        y = Dense(32, jnp.dtype("bfloat16"), use_bias=False).apply(
            {"params": {"kernel": kernel}}, x
        )
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    traced = jax.jit(jax.grad(loss)).trace(jnp.zeros((64, 32)), jnp.zeros((8, 64), jnp.bfloat16))
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    results = [line.rsplit("->", 1)[1] for line in products]
    assert sum("64x32xf32" in result for result in results) == 1
    assert not any("64x32xbf16" in result for result in results)
