"""The optimizer: AdamW with a decay mask, warm-up and cosine, and clipped logit scales."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mlip_jax.parallel import path_name


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up, then cosine to 0 at the last sample; a function of the step.

    The first step has a rate above 0: at step s the rate is that of s + 1 finished batches.
    """
    peak, warmup, total = (
        config.optimizer.learning_rate,
        max(config.optimizer.warmup_samples, 1),
        config.samples,
    )

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        seen = (step.astype(jnp.float32) + 1.0) * config.batch_size
        progress = jnp.clip((seen - warmup) / max(total - warmup, 1), 0.0, 1.0)
        return peak * jnp.minimum(seen / warmup, 1.0) * 0.5 * (1 + jnp.cos(math.pi * progress))

    return schedule


def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
    """True for matrices and filters; biases, norms, scales, positions and class token stay."""
    name = path_name(path)
    return leaf.ndim >= 2 and not name.endswith("position")


def make(config: ConfigDict) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm)
        if config.optimizer.clip_norm > 0
        else optax.identity(),
        optax.adamw(
            learning_rate(config),
            b1=config.optimizer.b1,
            b2=config.optimizer.b2,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(decays, params),
        ),
    )


def clip_scales(params: dict[str, Any], max_scale: float) -> dict[str, Any]:
    """Keeps every logit scale in [1, max_scale], as CLIP does."""
    top = math.log(max_scale)
    return {
        name: jnp.clip(value, 0.0, top) if name.startswith("log_scale_") else value
        for name, value in params.items()
    }
