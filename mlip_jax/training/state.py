"""The state of a run: what a step reads and writes, and a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from optax import LookaheadParams

from mlip_jax.devices import parallel
from mlip_jax.models import adapters, building
from mlip_jax.models.two_tower import TwoTower
from mlip_jax.storage.saved import served


@flax.struct.dataclass
class TrainState:
    """Step count, parameters, optimizer state, and what else training keeps; {} where it does not.

    Attributes:
      step: steps done.
      params: the parameters that gradients are taken of.
      batch_stats: running means and variances of batch norm.
      optimizer: the optimizer's state.
      ema: the moving average of the parameters.
      slow: Lookahead's slow parameters.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    optimizer: optax.OptState
    ema: Any
    slow: Any

    @property
    def evaluated(self) -> dict[str, Any]:
        """The variables to evaluate and to serve."""
        return served(vars(self))


def initial_state(
    model: TwoTower,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    pretrained: Mapping[str, Any] | None = None,
) -> TrainState:
    """A fresh state; a pure function of its arguments, the config's seed included.

    Call it under jit. `pretrained` holds those of the variables to take in place of fresh ones,
    such as {"params": {"text_encoder": ...}}.
    """
    variables = building.initialise(model, config, jax.random.key(config.seed))
    if pretrained:
        replaced = traverse_util.flatten_dict(dict(pretrained))
        variables = traverse_util.unflatten_dict(traverse_util.flatten_dict(variables) | replaced)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)  # not the model's own
    params = adapters.add(variables["params"], config, key)
    lookahead = config.optimizer.lookahead.period > 0

    # Copies: the donated state may not hold one buffer twice.
    def copied() -> Any:
        return jax.tree.map(jnp.copy, params)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        optimizer=optimizer.init(LookaheadParams(params, params) if lookahead else params),
        ema=copied() if config.optimizer.ema else {},
        slow=copied() if lookahead else {},
    )


def abstract_state(
    model: TwoTower, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing it.

    Raises:
      UserError: for a rule of config.sharding that cannot be followed.
    """
    shapes = jax.eval_shape(lambda: initial_state(model, optimizer, config))
    rules = parallel.sharding_rules(config.sharding, shapes.params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        parallel.tree_shardings(shapes, mesh, rules),
    )
