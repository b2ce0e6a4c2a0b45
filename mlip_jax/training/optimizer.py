"""The optimizer: AdamW, Muon or SGD with a decay mask and a schedule; clipped logit scales."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mlip_jax.core import stages
from mlip_jax.core.registry import OPTIMIZERS, SCHEDULES
from mlip_jax.devices.parallel import path_name
from mlip_jax.models.adapters import ADAPTERS
from mlip_jax.training import muon as orthogonal

_ADAMW_RMS = 0.2  # of an element of AdamW's updates, before the learning rate


# Of a config: samples seen, float32, after the warm-up -> the share of the peak rate, in [0, 1].
MakeSchedule = Callable[[ConfigDict], Callable[[Float[Array, ""]], Float[Array, ""]]]
# Of config.optimizer, the rate by step, and a mask of what decays: the updates, the rate included.
MakeOptimizer = Callable[
    [ConfigDict, optax.Schedule, Callable[[Any], Any]], optax.GradientTransformation
]


def learning_rate(config: ConfigDict, place: stages.Place = stages.WHOLE) -> optax.Schedule:
    """Linear warm-up, then config.optimizer.schedule, then a linear cooldown; by the run's step.

    The first step has a rate above 0: at step s the rate is that of s + 1 finished batches.
    `place` is that of a stage, whose schedule may have begun before it.
    """
    before = float(place.samples - place.schedule)
    peak, warmup = config.optimizer.learning_rate, _floating(config.optimizer.warmup_samples)
    share = SCHEDULES[config.optimizer.schedule](config)
    end, cooldown = _floating(config.samples), config.optimizer.cooldown_samples

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        seen = ((step - place.first).astype(jnp.float32) + 1.0) * config.batch_size + before
        rate = peak * jnp.minimum(seen / warmup, 1.0) * share(seen)
        if cooldown > 0:
            rate = rate * jnp.clip((end - seen) / _floating(cooldown), 0.0, 1.0)
        return rate

    return schedule


def last_step_before_cooldown(config: ConfigDict) -> int:
    """Steps after which a run can still be made longer; 0 for one that cannot.

    Those are runs without a cooldown, and runs in stages, whose borders would move.
    """
    cooldown = config.optimizer.cooldown_samples
    if cooldown <= 0 or config.stages:
        return 0
    # One less than there are: samples are counted in float32.
    return max((config.samples - cooldown) // config.batch_size - 1, 0)


def _floating(samples: int) -> float:
    """At least 1, and no int: JAX takes a Python int for an int32, which ends at 2^31 samples."""
    return float(max(samples, 1))


def cosine(config: ConfigDict) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """From 1 at the end of the warm-up to 0 at the last sample, by half a cosine."""
    warmup = _floating(config.optimizer.warmup_samples)
    rest = _floating(config.samples - max(config.optimizer.warmup_samples, 1))

    def share(seen: Float[Array, ""]) -> Float[Array, ""]:
        progress = jnp.clip((seen - warmup) / rest, 0.0, 1.0)
        return 0.5 * (1 + jnp.cos(math.pi * progress))

    return share


def constant(config: ConfigDict) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """Always 1."""
    del config
    return jnp.ones_like


def rsqrt(config: ConfigDict) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """1 at the end of the warm-up, then by 1 / sqrt(samples), whatever the length of the run."""
    warmup = _floating(config.optimizer.warmup_samples)
    return lambda seen: jnp.sqrt(warmup / jnp.maximum(seen, warmup))


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


def make(config: ConfigDict, place: stages.Place = stages.WHOLE) -> optax.GradientTransformation:
    """Clipping by global norm, then config.optimizer.name at each tower's rate; perhaps Lookahead.

    `place` is that of a stage in its run.

    With Lookahead (arXiv 1907.08610) the transformation takes and moves `optax.LookaheadParams`.
    A frozen tower has no state, and its update is 0.
    """
    settings = config.optimizer
    norm, lookahead = settings.clip_norm, settings.lookahead
    steps = [optax.clip_by_global_norm(norm)] if norm > 0 else []
    steps.append(OPTIMIZERS[settings.name](settings, learning_rate(config, place), _decayed))
    if settings.layer_decay != 1.0 or any(share != 1.0 for share in settings.rates.values()):
        steps.append(optax.stateless(_scaled(settings)))
    chain = optax.chain(*steps)
    if frozen := frozen_encoders(config):
        chain = _of_the_others(chain, frozen)
    if lookahead.period > 0:
        return optax.lookahead(chain, lookahead.period, lookahead.alpha)
    return chain


def frozen_encoders(config: ConfigDict) -> tuple[str, ...]:
    """The encoders whose own parameters stay as they are, by their names in the tree.

    Those are the ones without a learning rate, and with adapters both: only these learn.
    """
    adapted, rates = config.model.adapters.rank > 0, config.optimizer.rates
    return tuple(f"{name}_encoder" for name in ("image", "text") if adapted or not rates[name])


def _of_the_others(
    inner: optax.GradientTransformation, frozen: Collection[str]
) -> optax.GradientTransformation:
    """The transformation of all parameters but the frozen ones, whose updates are 0."""

    def others(tree: Any) -> Any:
        return {name: part for name, part in tree.items() if name not in frozen}

    def init(params: Any) -> Any:
        return inner.init(others(params))

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(others(gradient), state, others(params))
        still = {name: jax.tree.map(jnp.zeros_like, gradient[name]) for name in frozen}
        return still | updates, state

    return optax.GradientTransformation(init, update)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(
    settings: ConfigDict,
    rate: optax.Schedule,
    mask: Callable[[Any], Any],
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv 1711.05101)."""
    return optax.adamw(
        rate,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=mask,
        nesterov=nesterov,
    )


def muon(
    settings: ConfigDict, rate: optax.Schedule, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Orthogonal updates of the kernels; AdamW with Nesterov momentum for all else.

    Muon (Jordan et al. 2024) moves kernels by about the nearest orthogonal matrix to their
    momentum, scaled to the RMS of AdamW's updates (arXiv 2502.16982), so that both take the same
    learning rate.
    """
    return orthogonal.muon(
        rate,
        adamw(settings, rate, mask, nesterov=True),
        by_muon,
        eps=settings.eps,
        rms=_ADAMW_RMS,
        weight_decay=settings.weight_decay,
        mask=mask,
    )


def sgd(
    settings: ConfigDict, rate: optax.Schedule, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """SGD with momentum; the weight decay is added to the gradient, as PyTorch does."""
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask),
        optax.sgd(rate, settings.momentum),
    )


def tower(path: tuple[Any, ...]) -> str:
    """ "image" or "text" for the parameters of an encoder or its adapters, "heads" for others."""
    root = _module(path).split("/", 1)[0]
    return {"image_encoder": "image", "text_encoder": "text"}.get(root, "heads")


def _module(path: tuple[Any, ...]) -> str:
    return path_name(path).removeprefix(f"{ADAPTERS}/")


def layer_shares(params: Any, decay: float) -> Any:
    """Each parameter's share of its tower's learning rate, by the depth that it lies at.

    As BEiT (arXiv 2106.08254) counts: 1 for the heads and for what follows an encoder's last block,
    `decay` for the last block, its square for the one before, and one power more than the
    first block's for what precedes that.
    """
    blocks: dict[str, set[tuple[str, int, int]]] = {"image": set(), "text": set()}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        if block := _block(path):
            blocks[tower(path)].add(block)

    def share(path: tuple[Any, ...], leaf: Any) -> float:
        del leaf
        name = tower(path)
        if name == "heads" or _AFTER_BLOCKS.match(_module(path)):
            return 1.0
        order, block = sorted(blocks[name]), _block(path)
        return decay ** (len(order) - (order.index(block) if block else -1))

    return jax.tree_util.tree_map_with_path(share, params)


# "spatial_3", of "image_encoder/spatial_3/mlp/up/kernel"; "stage_0_block_1" of a ResNet's.
_BLOCK = re.compile(r"\w+_encoder/([a-z]+)_(\d+)(?:_[a-z]+_(\d+))?/")
_AFTER_BLOCKS = re.compile(r"\w+_encoder/(norm(_spatial|_frequency)?|pool\w*)/")


def _block(path: tuple[Any, ...]) -> tuple[str, int, int] | None:
    """What a block is sorted by; the Frequency Stage comes before the Spatial one."""
    match = _BLOCK.match(_module(path))
    return (match[1], int(match[2]), int(match[3] or 0)) if match else None


def _scaled(settings: ConfigDict) -> Callable[[Any, Any], Any]:
    """Multiplies each update by its tower's and its layer's share of the learning rate."""

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, update, share: update * (settings.rates[tower(path)] * share),
            updates,
            layer_shares(updates, settings.layer_decay),
        )

    return scale


def clip_scales(params: dict[str, Any], max_scale: float) -> dict[str, Any]:
    """Keeps every logit scale in [1, max_scale], as CLIP does."""
    top = math.log(max_scale)
    return {
        name: jnp.clip(value, 0.0, top) if name.startswith("log_scale_") else value
        for name, value in params.items()
    }
