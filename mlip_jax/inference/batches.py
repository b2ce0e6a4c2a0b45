"""Any number of rows through a compiled function, in batches of few sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mlip_jax.devices import parallel


class Batches:
    """Calls functions of (variables, arrays with a row an example) batch by batch."""

    def __init__(self, size: int, mesh: Mesh | None) -> None:
        """Takes the rows of a batch, rounded up to the devices of a mesh, and that mesh."""
        self._mesh = mesh
        shards = parallel.batch_shards(mesh) if mesh else 1
        self._size = -(-size // shards) * shards

    def size(self, total: int) -> int:
        """Rows of a batch, of so many in all; a few rows cost no whole one."""
        if self._mesh:
            return self._size
        return min(self._size, 1 << max(total - 1, 0).bit_length())

    def call(
        self, function: Callable[..., jax.Array], variables: Any, *arrays: np.ndarray
    ) -> np.ndarray:
        """Calls `function` on all rows of some arrays."""
        total = len(arrays[0])
        if not total:
            result = jax.eval_shape(function, variables, *map(jnp.asarray, arrays))
            return np.zeros(result.shape, result.dtype)
        size = self.size(total)
        starts = range(0, total, size)
        batches = (tuple(rows[start : start + size] for rows in arrays) for start in starts)
        return self.over(function, variables, batches, size)

    def over(
        self,
        function: Callable[..., jax.Array],
        variables: Any,
        batches: Iterable[tuple[np.ndarray, ...]],
        size: int,
    ) -> np.ndarray:
        """Calls `function` on each batch, filled up to `size` rows; its rows, one after another."""
        results = []
        for batch in batches:
            parts = {str(index): _filled(rows, size) for index, rows in enumerate(batch)}
            placed = (
                parallel.global_batch(parts, self._mesh) if self._mesh else jax.device_put(parts)
            )
            result = function(variables, *(placed[index] for index in parts))
            results.append((result, len(batch[0])))
            if len(results) > 1:
                # One batch ahead of the device, not all of them.
                results[-2] = (jax.device_get(results[-2][0]), results[-2][1])
        return np.concatenate([jax.device_get(rows)[:count] for rows, count in results])


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """The rows, and zeros up to `size` rows."""
    return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))
