"""The optimizer: AdamW, Muon or SGD with a decay mask, warm-up and cosine; clipped logit scales."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mlip_jax.devices.parallel import path_name
from mlip_jax.training.muon import muon

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


def by_muon(params: Any) -> Any:
    """What Muon turns into orthogonal updates, the kernels, and what it leaves to Adam."""

    def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
        del leaf
        return "muon" if path_name(path).endswith("kernel") else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def make(config: ConfigDict) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, Muon or SGD, at each tower's rate; perhaps Lookahead.

    Muon (Jordan et al. 2024) moves kernels by about the nearest orthogonal matrix to their
    momentum, scaled to the RMS of AdamW's updates (arXiv 2502.16982), so that both take the same
    learning rate. All that is no kernel goes by AdamW with Nesterov momentum. SGD adds the weight
    decay to the gradient, as PyTorch does.

    With Lookahead (arXiv 1907.08610) the transformation takes and moves `optax.LookaheadParams`.
    """
    settings = config.optimizer
    norm, lookahead = settings.clip_norm, settings.lookahead
    steps = [optax.clip_by_global_norm(norm)] if norm > 0 else []
    steps.append(_updates(settings, learning_rate(config)))
    if any(share != 1.0 for share in settings.rates.values()):
        steps.append(optax.stateless(_scaled(settings.rates.to_dict())))
    chain = optax.chain(*steps)
    if lookahead.period > 0:
        return optax.lookahead(chain, lookahead.period, lookahead.alpha)
    return chain


def _updates(settings: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(decays, params)

    if settings.name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(settings.weight_decay, mask),
            optax.sgd(rate, settings.momentum),
        )
    adamw = functools.partial(
        optax.adamw,
        rate,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=mask,
    )
    if settings.name == "muon":
        return muon(
            rate,
            adamw(nesterov=True),
            by_muon,
            eps=settings.eps,
            rms=_ADAMW_RMS,
            weight_decay=settings.weight_decay,
            mask=mask,
        )
    return adamw()


def tower(path: tuple[Any, ...]) -> str:
    """ "image" or "text" for the parameters of an encoder, "heads" for all others."""
    root = path_name(path).split("/", 1)[0]
    return {"image_encoder": "image", "text_encoder": "text"}.get(root, "heads")


def _scaled(rates: Mapping[str, float]) -> Callable[[Any, Any], Any]:
    """Multiplies each tower's updates by its share of the learning rate."""

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, update: update * rates[tower(path)], updates
        )

    return scale


def clip_scales(params: dict[str, Any], max_scale: float) -> dict[str, Any]:
    """Keeps every logit scale in [1, max_scale], as CLIP does."""
    top = math.log(max_scale)
    return {
        name: jnp.clip(value, 0.0, top) if name.startswith("log_scale_") else value
        for name, value in params.items()
    }
