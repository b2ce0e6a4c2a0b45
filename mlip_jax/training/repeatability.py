"""Whether a step gives the same bits each time: on GPUs a run finds out before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt32
from ml_collections import ConfigDict

from mlip_jax.devices import parallel
from mlip_jax.training.run import Run
from mlip_jax.training.state import TrainState
from mlip_jax.training.step import Step, random_rows

_PROBED = ("gpu",)  # platforms


def is_probed(mesh: Mesh) -> bool:
    """Whether runs on these devices are probed."""
    return mesh.devices.flat[0].platform in _PROBED


def probe(run: Run, step: Step, fresh: Callable[[], TrainState]) -> str:
    """Takes the first step twice, on a random batch, and says in a line what that came to.

    All processes call it.

    Args:
      run: opened.
      step: compiled, of the first stage; it takes the state away.
      fresh: makes the state that the run starts from.
    """
    config = run.stages[0].config
    first, second = (_digest(step(fresh(), random_batch(run, config))[0]) for _ in range(2))
    if np.array_equal(first, second):
        return (
            "repeatable: a step taken twice gave the same bits. So will a resumed run with this "
            "program; another compilation may choose other kernels"
        )
    return (
        "not repeatable: a step taken twice gave other bits, so that a resumed run equals an "
        "uninterrupted one up to rounding only"
    )


def random_batch(run: Run, config: ConfigDict) -> dict[str, Array]:
    """Random pixels and token ids in the place of a batch of a stage, on the run's devices."""
    batch = random_rows(config, run.mesh, run.tokenizer.vocab_size, seed=0)
    count = len(batch["record"])
    batch |= run.teachers.random_rows(count, seed=0)
    messages = run.channel.tell(np.full(count, -1, np.int32), False)
    weights = run.teachers.placed(run.mesh)
    return parallel.global_batch(batch, run.mesh) | messages | weights


def _digest(state: TrainState) -> UInt32[np.ndarray, " leaves"]:
    """A number for the bits of each array of a state."""
    return np.asarray(_sums(jax.tree.leaves(state)))


@jax.jit
def _sums(leaves: list[Any]) -> UInt32[Array, " leaves"]:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(leaf: Array) -> UInt32[Array, ""]:
    """The bits as numbers, each with a factor of its own, modulo 2^32."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    factors = jnp.ones((), jnp.uint32)
    for axis in range(leaf.ndim):
        places = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        factors = factors * (2 * places + 2 * axis + 1)  # odd: no bit is lost
    return jnp.sum(bits * factors, dtype=jnp.uint32)
