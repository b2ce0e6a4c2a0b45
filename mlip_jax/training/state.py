"""The state of a run: what a step reads and writes, and a checkpoint holds."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from mlip_jax import parallel
from mlip_jax.models.two_tower import TwoTower


@flax.struct.dataclass
class TrainState:
    """Step count, parameters, optimizer state and, when it is on, the averaged parameters."""

    step: Int[Array, ""]
    params: Any
    optimizer: optax.OptState
    ema: Any  # {} without averaging

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate and to serve: the average when there is one."""
        return self.ema or self.params


def initial_state(
    model: TwoTower, optimizer: optax.GradientTransformation, config: ConfigDict
) -> TrainState:
    """A fresh state; a pure function of the config, seed included. Call it under jit."""
    size = config.model.image.image_size
    # Two examples: shapes only, parameters do not depend on the values.
    images = jnp.zeros((2, size, size, 3), jnp.float32)
    token_ids = jnp.zeros((2, config.model.text.context_length), jnp.int32)
    params = model.init(jax.random.key(config.seed), images, token_ids)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        # A copy: the donated state may not hold one buffer twice.
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema else {},
    )


def abstract_state(
    model: TwoTower, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing it."""
    shapes = jax.eval_shape(lambda: initial_state(model, optimizer, config))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        parallel.tree_shardings(shapes, mesh),
    )
