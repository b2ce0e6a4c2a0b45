"""One training step, as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlip_jax.data.images import Preprocessing
from mlip_jax.models.two_tower import TwoTower
from mlip_jax.objectives import perspectives
from mlip_jax.training.optimizer import clip_scales, learning_rate
from mlip_jax.training.state import TrainState

Metrics = dict[str, Float[Array, ""]]


def make_train_step(
    model: TwoTower,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    preprocessing: Preprocessing,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]:
    """The step: forward, every perspective's loss, gradient, update, average.

    The step takes the state and {"image": uint8 [batch, size, size, 3], "token_ids": int32
    [batch, context]}, with "image_2" and "token_ids_2" where a perspective compares two views of a
    modality, all for the global batch, and returns the next state and scalars. A step whose loss or
    gradient is not finite changes nothing but the step's number, so that the last good state
    survives until the host hears of it.

    Args:
      model: the network.
      optimizer: from `optimizer.make`.
      config: the run's.
      preprocessing: the run's.
      mesh: the devices that the batch's rows lie on; None: one.
    """
    terms = perspectives.terms(config)
    schedule = learning_rate(config)
    key = jax.random.key(config.seed + 1)  # + 1: not the key of the initial parameters
    decay = config.optimizer.ema

    frozen = [f"{tower}_encoder" for tower in model.frozen]
    lookahead = config.optimizer.lookahead.period > 0

    def loss_fn(
        params: Any, state: TrainState, batch: dict[str, Array]
    ) -> tuple[Array, tuple[Metrics, Any]]:
        # No gradient, so no backward pass either.
        params = params | {name: jax.lax.stop_gradient(params[name]) for name in frozen}
        second = batch.get("image_2")
        (embeddings, scales, biases), updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            preprocessing.normalize(batch["image"]),
            batch["token_ids"],
            None if second is None else preprocessing.normalize(second),
            batch.get("token_ids_2"),
            deterministic=False,
            rngs={"dropout": jax.random.fold_in(key, state.step)},
            mutable=["batch_stats"],
        )

        def critic(view: str, one: Array, other: Array) -> Array:
            return model.apply({"params": params}, view, one, other, method="score_pairs")

        loss, losses = perspectives.total_loss(
            terms,
            embeddings,
            scales,
            biases,
            state.step.astype(jnp.float32) * config.batch_size,
            prior_weight=config.model.prior_weight,
            chunk=config.token_chunk,
            mesh=mesh,
            critic=critic if model.critic == "concat" else None,
        )
        metrics = {f"loss/{view}": value for view, value in losses.items()}
        metrics |= {f"scale/{view}": scale for view, scale in scales.items()}
        return loss, (metrics, updated.get("batch_stats", {}))

    def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        (loss, (metrics, batch_stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state, batch
        )
        norm = optax.tree.norm(gradient)
        before = optax.LookaheadParams(state.params, state.slow) if lookahead else state.params
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, before)
        after = optax.apply_updates(before, updates)
        params, slow = (
            clip_scales(weights, config.optimizer.max_scale)
            for weights in (after if lookahead else (after, state.slow))
        )
        ema = state.ema
        if decay:
            # Early on the average follows closely; without this it would remember the start.
            seen = state.step.astype(jnp.float32)
            rate = jnp.minimum(decay, (1.0 + seen) / (10.0 + seen))
            ema = jax.tree.map(lambda old, new: rate * old + (1.0 - rate) * new, ema, params)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        good = TrainState(state.step, params, batch_stats, optimizer_state, ema, slow)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), good, state)
        metrics |= {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": schedule(state.step),
        }
        return kept.replace(step=state.step + 1), metrics

    return train_step
