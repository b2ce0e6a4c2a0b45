"""The yardstick: how fast this device multiplies matrices."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
import numpy as np

_SECONDS = 1.0  # for each size
_SIDES = {"cpu": (1024, 2048)}  # of the square matrices; large enough to be bound by arithmetic
_SIDES_OF_OTHERS = (4096, 8192)


def matrix_peak(dtype: jnp.dtype) -> float:
    """FLOP/s of a product of two square matrices on the first device, the best of two seconds.

    On CPUs the product has all cores, so it is the peak of the whole host. Other work on the host
    lowers it: measure more than once, and take the best.

    Args:
      dtype: of both matrices; the product is summed in float32.
    """
    device = jax.local_devices()[0]

    @jax.jit
    def product(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.dot(one, other, preferred_element_type=jnp.float32)

    best = 0.0
    for side in _SIDES.get(device.platform, _SIDES_OF_OTHERS):
        values = np.random.default_rng(0).standard_normal((side, side), np.float32)
        one = jax.device_put(values.astype(dtype), device)
        product(one, one).block_until_ready()
        least, begun = math.inf, time.perf_counter()
        while (start := time.perf_counter()) - begun < _SECONDS:
            product(one, one).block_until_ready()
            least = min(least, time.perf_counter() - start)
        best = max(best, 2.0 * side**3 / least)
    return best
