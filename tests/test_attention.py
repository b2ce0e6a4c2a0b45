"""Attention against the plain formula, and what its products are computed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from mlip_jax.models.layers import Attention, Dense

BATCH, TOKENS, HEADS, WIDTH = 3, 9, 4, 32


@pytest.fixture
def inputs():
    """Tokens, their sizes, and a mask as a causal text's with padding."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, TOKENS, WIDTH)), jnp.float32)
    size = jnp.asarray(rng.integers(1, 5, (BATCH, TOKENS)), jnp.float32)
    place = np.arange(TOKENS)
    lengths = np.array([3, 6, 9])
    mask = (place[:, None] >= place) & (place < lengths[:, None, None])
    return x, size, jnp.asarray(mask[:, None])


def plain(params, x, mask, size, heads=HEADS):
    """Attention by the book, its gradient JAX's own: output, mean keys, the class token's row."""

    def dense(name, x, features):
        return Dense(features, x.dtype).apply({"params": params[name]}, x)

    qkv = dense("qkv", x, 3 * x.shape[-1])
    q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=heads)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    if size is not None:
        logits = logits + jnp.log(size)[:, None, None, :]
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    out = rearrange(jnp.einsum("bhqk,bhkd->bhqd", weights, v), "b h t d -> b t (h d)")
    return dense("out", out, x.shape[-1]), jnp.mean(k, axis=1), jnp.mean(weights[:, :, 0], axis=1)


def gradient(function, params, x):
    """Value, the three outputs, and gradients to parameters and tokens, in float32."""

    def loss(params, x):
        found = [part.astype(jnp.float32) for part in function(params, x)]
        return sum(jnp.sum(jnp.sin(part)) for part in found), found

    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.float32)), found)


def ours(dtype, x, mask, size):
    """Attention as a function of its parameters and tokens, and parameters."""
    layer = Attention(HEADS, 0.0, jnp.dtype(dtype))
    params = layer.init(jax.random.key(0), x, True)["params"]
    return lambda params, x: layer.apply({"params": params}, x, True, mask, size), params


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_in_float32_it_is_the_plain_formula_bit_for_bit(inputs, masked, sized):
    x, size, mask = inputs
    mask, size = mask if masked else None, size if sized else None
    function, params = ours("float32", x, mask, size)
    found = gradient(function, params, x)
    wanted = gradient(lambda params, x: plain(params, x, mask, size), params, x)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_in_bfloat16_it_is_near_float32(inputs):
    x, size, mask = inputs
    function, params = ours("bfloat16", x, mask, size)
    found = gradient(function, params, x.astype(jnp.bfloat16))
    wanted = gradient(lambda params, x: plain(params, x, mask, size), params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.1), found, wanted)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_multiply_bfloat16_forth_and_back(inputs, platform):
    x, size, mask = inputs
    function, params = ours("bfloat16", x, mask, size)

    def loss(params, x):
        return jnp.sum(jnp.sin(function(params, x)[0].astype(jnp.float32)))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(params, x.astype(jnp.bfloat16))
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == 12  # qkv, scores, values, out, and two for each in the gradient
    for line in products:
        operands, _ = line.rsplit(":", 1)[1].split("->")
        assert operands.count("bf16") == 2, line
