"""Guided token merging: which tokens become one, as pure functions on arrays.

Without guidance it is ToMe (arXiv 2210.09461). With guidance, unimportant tokens are merged into
their most similar important ones (docs/method.md). A plan is the same for both: the output slot of
every input token. Merging is then a product with a 0/1 matrix, whose gradient is a product too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mlip_jax.core.errors import UserError, suggestion

SCHEDULES = ("even", "early")
_NEVER = -jnp.inf


class Plan(NamedTuple):
    """The output slot of every token, and how many slots there are (a Python int)."""

    slot: Int[Array, "batch tokens"]
    count: int  # type: ignore[assignment]  # hides tuple.count, which no plan needs


def schedule(rate: float, tokens: int, blocks: int, spread: str) -> tuple[int, ...]:
    """Tokens to merge in each block so that `rate` of the patch tokens are gone at the end.

    Args:
      rate: rho, in [0, 0.95].
      tokens: patch tokens N at the start.
      blocks: blocks that merge.
      spread: "even": the same number a block; "early": falling linearly; or a comma list of
        weights, one a block, such as "4,2,1,1".

    Returns:
      One number a block; they sum to round(rate * tokens).

    Raises:
      UserError: when the rate lies outside the range or asks a block for more than half of its
        tokens; the message names the largest rate that can be had.
    """
    if spread == "even":
        weights = [1.0] * blocks
    elif spread == "early":
        weights = [float(blocks - index) for index in range(blocks)]
    else:
        try:
            weights = [float(weight) for weight in spread.split(",")]
        except ValueError:
            raise UserError(
                f"config.model.image.merging.schedule={spread!r} is neither "
                f"{', '.join(SCHEDULES)} nor a comma list of numbers{suggestion(spread, SCHEDULES)}"
            ) from None
        if (
            len(weights) != blocks
            or not all(map(math.isfinite, weights))
            or min(weights) < 0
            or sum(weights) <= 0
        ):
            raise UserError(
                f"config.model.image.merging.schedule={spread!r} must hold one weight for each of "
                f"the {blocks} blocks of the Spatial Stage, none negative and one above 0"
            )
    if not 0 <= rate <= 0.95:
        raise UserError(f"config.model.image.merging.rate={rate} must lie in [0, 0.95]")
    merged = _spread(round(rate * tokens), weights)
    if not _fits(merged, tokens):
        total = next(
            total for total in range(tokens, -1, -1) if _fits(_spread(total, weights), tokens)
        )
        # Rounded down, so that the rate that is named is one that works.
        largest = int(1000 * total / tokens) / 1000
        raise UserError(
            f"config.model.image.merging.rate={rate} cannot be reached: the schedule {spread!r} "
            f"over {blocks} blocks would merge more than half of a block's tokens; "
            f"the largest rate here is {largest:g}"
        )
    return merged


def _spread(total: int, weights: list[float]) -> tuple[int, ...]:
    """Splits `total` by weights into ints that sum to it (rounding the cumulative sums)."""
    whole, running, given, parts = sum(weights), 0.0, 0, []
    for weight in weights:
        running += weight
        parts.append(int(total * running / whole + 0.5) - given)
        given += parts[-1]
    return tuple(parts)


def _fits(merged: tuple[int, ...], tokens: int) -> bool:
    for r in merged:
        if r > tokens // 2:
            return False
        tokens -= r
    return True


def _normalize(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _ranks(scores: Float[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
    """Ranks within each row, from 0; of equal scores the earlier has the lower rank.

    By counting: for a few hundred tokens all comparisons cost less than two sorts
    (docs/performance.md).
    """
    index = jnp.arange(scores.shape[-1])
    one, other = scores[:, :, None], scores[:, None, :]
    before = (other < one) | ((other == one) & (index < index[:, None]))
    ranks: Array = jax.lax.platform_dependent(
        before, cuda=count_by_product, rocm=count_by_product, default=count
    )
    return ranks


def count(flags: Bool[Array, "batch tokens others"]) -> Int[Array, "batch tokens"]:
    """How many of the others are flagged."""
    return jnp.sum(flags, axis=-1, dtype=jnp.int32)


def count_by_product(flags: Bool[Array, "batch tokens others"]) -> Int[Array, "batch tokens"]:
    """`count` as a product, which XLA compiles for GPUs in a tenth of the time (jaxlib 0.10).

    Exact up to 2^24: zeros and ones are bfloat16 numbers, and their sums are float32.
    """
    ones = jnp.ones(flags.shape[-1], jnp.bfloat16)
    counts = jnp.einsum(
        "bij,j->bi", flags.astype(jnp.bfloat16), ones, preferred_element_type=jnp.float32
    )
    return counts.astype(jnp.int32)


def rank01(scores: Float[Array, "batch tokens"]) -> Float[Array, "batch tokens"]:
    """Ranks within each row, scaled to [0, 1]; of equal scores the earlier has the lower rank."""
    return _ranks(scores).astype(jnp.float32) / max(scores.shape[-1] - 1, 1)


def importance(
    spatial: Float[Array, "batch tokens"] | None,
    frequency: Float[Array, "batch tokens"] | None,
    mix: float,
) -> Float[Array, "batch tokens"]:
    """G = mix * rank01(frequency) + (1 - mix) * rank01(spatial); one of the two may be None.

    `guidance.importance` gives it any two ways, the first in the place of `frequency`.
    """
    if spatial is None or frequency is None:
        present = spatial if frequency is None else frequency
        if present is None:
            raise ValueError("importance of what? both guidances are None")
        return rank01(jax.lax.stop_gradient(present))
    return mix * rank01(jax.lax.stop_gradient(frequency)) + (1 - mix) * rank01(
        jax.lax.stop_gradient(spatial)
    )


def match(
    metric: Float[Array, "batch tokens width"],
    r: int,
    *,
    guidance: Float[Array, "batch patches"] | None = None,
    features: Float[Array, "batch patches feature"] | None = None,
    class_token: bool = True,
    similarity_mix: float = 0.5,
    importance_penalty: float = 0.1,
) -> Plan:
    """Chooses the `r` pairs of tokens to merge. No gradient flows through the choice.

    Args:
      metric: what similarity is the cosine of (head-mean keys); the class token comes first.
      r: merges; at most half of the patch tokens are merged, as in ToMe.
      guidance: importance of each patch token (`importance`). None is exactly ToMe: even tokens
        are sources, odd ones destinations, and the output is in ToMe's order. Otherwise the less
        important half are sources, the other half destinations, and the order is kept.
      features: with guidance, a second similarity: the patch tokens' frequency features.
      class_token: the first token is a class token and is never merged.
      similarity_mix: beta, the weight of the metric's cosine against the features'.
      importance_penalty: gamma; an edge loses gamma times its source's importance.

    Returns:
      The plan, with tokens - r slots.
    """
    tokens = metric.shape[1]
    protected = int(class_token)
    r = max(0, min(r, (tokens - protected) // 2))
    if r == 0:
        slot = jnp.broadcast_to(jnp.arange(tokens), metric.shape[:2])
        return Plan(slot, tokens)
    if guidance is None:
        return _match_alternating(_normalize(metric), r, class_token)
    keys = _normalize(metric[:, protected:])
    similarity = jnp.einsum("bsd,btd->bst", keys, keys)
    if features is not None:
        features = _normalize(features)
        similarity = similarity_mix * similarity + (1 - similarity_mix) * jnp.einsum(
            "bsd,btd->bst", features, features
        )
    patches = tokens - protected
    is_source = _ranks(guidance) < patches // 2
    similarity = jnp.where(is_source[:, None, :], _NEVER, similarity)
    strength = jnp.max(similarity, axis=-1) - importance_penalty * guidance
    strength = jnp.where(is_source, strength, _NEVER)
    destination = jnp.argmax(similarity, axis=-1) + protected
    merged = jnp.pad(_ranks(-strength) < r, ((0, 0), (protected, 0)))
    destination = jnp.pad(destination, ((0, 0), (protected, 0)))
    kept_slot = jnp.cumsum(~merged, axis=-1) - 1
    slot = jnp.where(merged, jnp.take_along_axis(kept_slot, destination, axis=-1), kept_slot)
    return Plan(slot, tokens - r)


def _match_alternating(
    metric: Float[Array, "batch tokens width"], r: int, class_token: bool
) -> Plan:
    """ToMe's bipartite soft matching; its output order: unmerged even tokens, then odd tokens."""
    even, odd = metric[:, ::2], metric[:, 1::2]
    similarity = jnp.einsum("bsd,btd->bst", even, odd)
    if class_token:
        similarity = similarity.at[:, 0].set(_NEVER)
    order = _ranks(-jnp.max(similarity, axis=-1))
    merged = order < r
    # With a class token ToMe puts the unmerged tokens back in place; without, by edge strength.
    kept_slot = jnp.cumsum(~merged, axis=-1) - 1 if class_token else order - r
    odd_slot = jnp.arange(odd.shape[1]) + even.shape[1] - r
    even_slot = jnp.where(merged, odd_slot[jnp.argmax(similarity, axis=-1)], kept_slot)
    slot = jnp.zeros(metric.shape[:2], even_slot.dtype)
    slot = slot.at[:, ::2].set(even_slot).at[:, 1::2].set(odd_slot)
    return Plan(slot, metric.shape[1] - r)


def assignment(plan: Plan, dtype: DTypeLike = jnp.float32) -> Float[Array, "batch merged tokens"]:
    """The plan as a 0/1 matrix."""
    return (plan.slot[:, None, :] == jnp.arange(plan.count)[None, :, None]).astype(dtype)


def merge(
    plan: Plan, tokens: Float[Array, "batch tokens width"], size: Float[Array, "batch tokens *one"]
) -> tuple[Float[Array, "batch merged width"], Float[Array, "batch merged *one"]]:
    """Size-weighted mean of the tokens of each slot, and the new sizes.

    Args:
      plan: from `match`.
      tokens: [batch, tokens, width], any float dtype; the mean is taken in float32.
      size: patches that each token stands for, [batch, tokens] or [batch, tokens, 1].
    """
    to_slot = assignment(plan)
    weight = size.reshape(size.shape[:2]).astype(jnp.float32)
    total = jnp.einsum("bst,bt->bs", to_slot, weight)
    share = to_slot * (weight[:, None, :] / total[:, :, None])
    merged = jnp.einsum("bst,btd->bsd", share, tokens.astype(jnp.float32)).astype(tokens.dtype)
    return merged, total.reshape(total.shape + (1,) * (size.ndim - 2)).astype(size.dtype)


def source(
    plan: Plan, previous: Float[Array, "batch tokens patches"] | None = None
) -> Float[Array, "batch merged patches"]:
    """Which of the original tokens each merged token stands for, through any number of merges.

    Args:
      plan: the latest merge.
      previous: what `source` gave for the merges before; None: this is the first.
    """
    to_slot = assignment(plan)
    return to_slot if previous is None else jnp.einsum("bst,btn->bsn", to_slot, previous)
