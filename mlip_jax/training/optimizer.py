"""The optimizer: AdamW or Muon with a decay mask, warm-up and cosine; clipped logit scales."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from mlip_jax.parallel import path_name

_ADAMW_RMS = 0.2  # of an element of AdamW's updates, before the learning rate


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


def matrices(params: Any) -> Any:
    """What Muon turns into orthogonal updates: the kernels, as maps from all else to outputs."""

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        if not path_name(path).endswith("kernel"):
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def make(config: ConfigDict) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW or Muon.

    Muon (Jordan et al. 2024) moves kernels by about the nearest orthogonal matrix to their
    momentum, scaled to the RMS of AdamW's updates (arXiv 2502.16982), so that both take the same
    learning rate. All that is no kernel goes by AdamW with Nesterov momentum.
    """
    settings = config.optimizer
    rate = learning_rate(config)

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(decays, params)

    if settings.name == "muon":
        update = muon(
            rate,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            weight_decay_mask=mask,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=_ADAMW_RMS,
        )
    else:
        update = optax.adamw(
            rate,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=mask,
        )
    norm = settings.clip_norm
    return optax.chain(optax.clip_by_global_norm(norm) if norm > 0 else optax.identity(), update)


def clip_scales(params: dict[str, Any], max_scale: float) -> dict[str, Any]:
    """Keeps every logit scale in [1, max_scale], as CLIP does."""
    top = math.log(max_scale)
    return {
        name: jnp.clip(value, 0.0, top) if name.startswith("log_scale_") else value
        for name, value in params.items()
    }
