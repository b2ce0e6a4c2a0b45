"""Cosines that come out the same to the last bit, however they are cut into blocks.

A matrix product in floating point depends, in its last bits, on the shape of the block that it is
a part of. Ranks then depend on it too: equal embeddings no longer tie, and a model that has
collapsed to a constant scores by luck. So embeddings are rounded to a fixed-point grid on which
float64 products and sums are exact.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped

from mlip_jax.config import RunError

# |sum a_i b_i| <= |a| |b| holds for every partial sum, so integers of 26 bits keep all sums of
# normalised rows below 2^53, where float64 is exact. The step, 1.5e-8, is finer than float32's.
_BITS = 26


def on_grid(
    embeddings: Shaped[np.ndarray, "rows width"], what: str
) -> Float[np.ndarray, "rows width"]:
    """Normalises rows and rounds them to multiples of 2^-26; products of two such rows are exact.

    A row of zeros stays zeros: it ties with everything.

    Args:
      embeddings: any float dtype; need not be normalised.
      what: the plural that an error calls them by, such as "image embeddings".

    Raises:
      RunError: for NaN or infinity, with the number of rows and the first one's index.
    """
    rows = np.asarray(embeddings, np.float64)
    damaged = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if damaged.size:
        raise RunError(
            f"{damaged.size} of {len(rows)} {what} hold NaN or infinity; the first is index "
            f"{damaged[0]}"
        )
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norms > 0, norms, 1)
    # Toward zero: no rounded row is longer than 1.
    return np.trunc(unit * 2.0**_BITS) / 2.0**_BITS
