"""One training step, as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
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
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]:
    """The step: forward, every perspective's loss, gradient, update, average.

    The step takes the state and {"image": uint8 [batch, size, size, 3], "token_ids": int32
    [batch, context]}, both for the global batch, and returns the next state and scalars. A step
    whose loss or gradient is not finite leaves parameters, optimizer and average as they were, so
    that the last good state survives until the host hears of it.
    """
    terms = perspectives.terms(config)
    schedule = learning_rate(config)
    key = jax.random.key(config.seed + 1)  # + 1: not the key of the initial parameters
    decay = config.optimizer.ema

    def loss_fn(params: Any, batch: dict[str, Array], step: Array) -> tuple[Array, Metrics]:
        images = preprocessing.normalize(batch["image"])
        embeddings, scales, biases = model.apply(
            {"params": params},
            images,
            batch["token_ids"],
            deterministic=False,
            rngs={"dropout": jax.random.fold_in(key, step)},
        )
        loss, losses = perspectives.total_loss(
            terms,
            embeddings,
            scales,
            biases,
            step.astype(jnp.float32) * config.batch_size,
            config.token_chunk,
        )
        metrics = {f"loss/{view}": value for view, value in losses.items()}
        metrics |= {f"scale/{view}": scale for view, scale in scales.items()}
        return loss, metrics

    def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, state.step
        )
        norm = optax.tree.norm(gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = clip_scales(optax.apply_updates(state.params, updates), config.optimizer.max_scale)
        ema = state.ema
        if decay:
            # Early on the average follows closely; without this it would remember the start.
            seen = state.step.astype(jnp.float32)
            rate = jnp.minimum(decay, (1.0 + seen) / (10.0 + seen))
            ema = jax.tree.map(lambda old, new: rate * old + (1.0 - rate) * new, ema, params)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        good = TrainState(state.step, params, optimizer_state, ema)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), good, state)
        metrics |= {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": schedule(state.step),
        }
        return kept.replace(step=state.step + 1), metrics

    return train_step
