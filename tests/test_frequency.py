"""The Frequency Stage: the published filter, and one transform in two forms."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models import frequency

DATA = Path(__file__).parent / "data"
FORMS = ("fft", "matmul")
GRIDS = [(7, 7), (6, 6), (5, 8), (8, 5), (1, 6), (3, 1), (2, 2)]

filter_grid = jax.jit(frequency.filter_grid, static_argnames="transform")


@pytest.mark.parametrize("transform", FORMS)
def test_published_filter(transform):
    with np.load(DATA / "global_filter.npz") as file:
        x, kernel, expected = file["x"], file["filter"], file["y"]
    filtered = filter_grid(x, kernel, transform=transform)
    np.testing.assert_allclose(filtered, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_both_forms_are_one_transform(grid):
    rows, columns = grid
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, rows, columns, 3)).astype(np.float32)
    kernel = rng.normal(size=(rows, columns // 2 + 1, 3, 2)).astype(np.float32)
    towards = rng.normal(size=x.shape).astype(np.float32)

    @jax.jit
    def value_and_gradients(x, kernel):
        results = []
        for transform in FORMS:
            function = functools.partial(frequency.filter_grid, transform=transform)
            value, back = jax.vjp(function, x, kernel)
            results.append((value, *back(towards)))
        return results

    fft, matmul = jax.device_get(value_and_gradients(x, kernel))
    for name, one, other in zip(("value", "x", "kernel"), fft, matmul, strict=True):
        assert np.abs(one).max() > 0.1  # there is something to compare
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("transform", FORMS)
def test_a_gain_of_one_changes_nothing(transform):
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 3)).astype(np.float32)
    kernel = np.zeros((5, 4, 3, 2), np.float32)
    kernel[..., 0] = 1.0
    np.testing.assert_allclose(filter_grid(x, kernel, transform=transform), x, atol=1e-6)


@pytest.mark.parametrize("transform", FORMS)
def test_it_is_a_circular_convolution(transform):
    """The filter of a kernel of pixels, by the definition of a convolution."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 5, 6, 1)).astype(np.float32)
    pixels = rng.normal(size=(5, 6)).astype(np.float32)
    gain = np.fft.rfft2(pixels)
    kernel = np.stack([gain.real, gain.imag], axis=-1)[:, :, None].astype(np.float32)
    expected = sum(
        pixels[r, c] * np.roll(x[0, :, :, 0], (r, c), axis=(0, 1))
        for r in range(5)
        for c in range(6)
    )
    filtered = filter_grid(x, kernel, transform=transform)[0, :, :, 0]
    np.testing.assert_allclose(filtered, expected, atol=1e-4)


def test_an_unknown_transform_is_refused():
    with pytest.raises(ValueError, match="'dct' is neither"):
        frequency.filter_grid(jnp.ones((1, 2, 2, 1)), jnp.ones((2, 2, 1, 2)), "dct")


def test_auto_is_one_of_the_forms():
    assert frequency.resolve_transform("auto") in FORMS
    assert [frequency.resolve_transform(form) for form in FORMS] == list(FORMS)
