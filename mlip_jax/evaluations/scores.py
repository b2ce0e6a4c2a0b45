"""Cosines that come out the same to the last bit, however they are cut into blocks.

A matrix product in floating point depends, in its last bits, on the shape of the block that it is
a part of. Ranks then depend on it too: equal embeddings no longer tie, and a model that has
collapsed to a constant scores by luck. So embeddings are rounded to a fixed-point grid on which
float64 products and sums are exact.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int, Int32, Shaped

from mlip_jax.core.errors import RunError

# |sum a_i b_i| <= |a| |b| holds for every partial sum, so integers of 26 bits keep all sums of
# normalised rows below 2^53, where float64 is exact. The step, 1.5e-8, is finer than float32's.
_BITS = 26

_PART = 1 << 20  # numbers that are float64 at a time


def on_grid(
    embeddings: Shaped[np.ndarray, "rows width"], noun: str
) -> Float[np.ndarray, "rows width"]:
    """Normalises rows and rounds them to multiples of 2^-26; products of two such rows are exact.

    A row of zeros stays zeros: it ties with everything.

    Args:
      embeddings: any float dtype; need not be normalised.
      noun: the plural that an error calls them by, such as "image embeddings".

    Raises:
      RunError: for NaN or infinity, with the number of rows and the first one's index.
    """
    return grid_integers(embeddings, noun) / 2.0**_BITS


def grid_integers(
    embeddings: Shaped[np.ndarray, "rows width"],
    noun: str,
    order: Int[np.ndarray, " rows"] | None = None,
) -> Int32[np.ndarray, "rows width"]:
    """`on_grid` times 2^26, in half the memory; arguments and errors as there.

    Args:
      order: the rows in this order.
    """
    rows = np.asarray(embeddings)
    step = max(1, _PART // max(1, rows.shape[1]))
    starts = range(0, len(rows), step)
    sound = [np.isfinite(rows[start : start + step]).all(axis=1) for start in starts]
    damaged = np.flatnonzero(~np.concatenate(sound)) if sound else np.zeros(0, int)
    if damaged.size:
        raise RunError(
            f"{damaged.size} of {len(rows)} {noun} hold NaN or infinity; the first is index "
            f"{damaged[0]}"
        )
    grid = np.empty(rows.shape, np.int32)
    for start in starts:
        part = slice(start, start + step)
        # In C order, so that a row's sum of squares is the same in every part.
        wide = np.array(rows[part] if order is None else rows[order[part]], np.float64, order="C")
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        # Toward zero: no rounded row is longer than 1.
        grid[part] = np.trunc(wide / np.where(norms > 0, norms, 1) * 2.0**_BITS)
    return grid


def products(
    left: Int32[np.ndarray, "left width"],
    right: Int32[np.ndarray, "right width"],
    pairs: tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]],
) -> Float64[np.ndarray, " pairs"]:
    """Exact inner products of rows of `grid_integers`, for pairs of a left and a right row."""
    inner_products = np.empty(len(pairs[0]))
    step = max(1, _PART // max(1, left.shape[1]))
    for start in range(0, len(inner_products), step):
        a, b = (indices[start : start + step] for indices in pairs)
        inner_products[start : start + step] = np.einsum("pe,pe->p", left[a] * 1.0, right[b] * 1.0)
    return inner_products
