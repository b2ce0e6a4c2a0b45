"""Muon: optax's, by other products."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as muon_of_optax

from mlip_jax.training.muon import muon, orthogonalize

RNG = np.random.default_rng(0)
SHAPES = {"wide": (4, 12), "tall": (12, 4), "convolution": (3, 3, 2, 8), "bias": (8,)}


def arrays():
    return {
        name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()
    }


def is_kernel(tree):
    return {name: name != "bias" for name in tree}


def ours(rate):
    return muon(
        rate,
        optax.adamw(rate, b1=0.8, b2=0.9, eps=1e-8, weight_decay=0.1, nesterov=True),
        lambda tree: {
            name: "muon" if kernel else "adam" for name, kernel in is_kernel(tree).items()
        },
        eps=1e-8,
        rms=0.2,
        weight_decay=0.1,
        mask=is_kernel,
    )


def theirs(rate):
    def axes(tree):
        return {
            name: MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
            if name != "bias"
            else None
            for name, leaf in tree.items()
        }

    return muon_of_optax(
        rate,
        eps=1e-8,
        weight_decay=0.1,
        weight_decay_mask=is_kernel,
        adam_b1=0.8,
        adam_b2=0.9,
        adam_weight_decay=0.1,
        muon_weight_dimension_numbers=axes,
        consistent_rms=0.2,
    )


def test_steps_and_state_are_those_of_optax():
    params = arrays()
    gradients = [arrays() for _ in range(4)]
    results = []
    for make in (ours, theirs):
        optimizer = make(optax.linear_schedule(0.1, 0.0, 10))
        state, moved = optimizer.init(params), params
        for gradient in gradients:
            updates, state = jax.jit(optimizer.update)(gradient, state, moved)
            moved = optax.apply_updates(moved, updates)
        results.append((moved, state))
    (moved, state), (expected, expected_state) = results
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for one, other in ((moved, expected), (state, expected_state)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), one, other
        )


def test_singular_values_end_near_one():
    matrix = jnp.asarray(RNG.normal(size=(16, 40)), jnp.float32)
    orthogonal = orthogonalize(matrix, jnp.asarray([3.4445, -4.7750, 2.0315]), 1e-8)
    values = np.linalg.svd(np.asarray(orthogonal), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    tall = orthogonalize(matrix.T, jnp.asarray([3.4445, -4.7750, 2.0315]), 1e-8)
    np.testing.assert_allclose(tall.T, orthogonal, rtol=1e-5, atol=1e-5)
