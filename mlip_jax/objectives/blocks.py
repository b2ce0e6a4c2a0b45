"""Losses over all pairs whose scores never exist whole, in tiles around a ring (`ring`).

The softmax and the divergence from a teacher take two rounds: one for the log-sum-exps of images
and texts, one that scores again for the gradient. The sigmoid loss takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mlip_jax.objectives import contrastive
from mlip_jax.objectives.contrastive import Scalar
from mlip_jax.objectives.equality import Keys, without_equal
from mlip_jax.objectives.ring import (
    Side,
    around,
    mean_loss,
    others_that_equal,
    pairs,
    value_and_gradient,
)

# images, texts, mask of the texts -> similarity image to text, similarity text to image
Similarity = Callable[
    [Any, Any, Any], tuple[Float[Array, "images texts"], Float[Array, "images texts"]]
]


class LogSum(NamedTuple):
    """The logarithm of a sum of exponentials, in two parts: log(total) + top.

    Together they would lose, at large scores, the digits that tell shares of the sum apart.
    """

    top: Float[Array, "*rows"]
    total: Float[Array, "*rows"]


def softmax(
    similarity: Similarity,
    images: Any,
    texts: Any,
    mask: Any,
    scale: Float[Array, ""] | float,
    *,
    chunk: int | None = None,
    mesh: Mesh | None,
    keys: Keys | None = None,
) -> Scalar:
    """`contrastive.softmax_of_scores` of all pairs' scaled similarities.

    Args:
      similarity: of a tile.
      images: tree of arrays [batch, ...], all of them with a gradient; they stay.
      texts: the same of the texts; they travel.
      mask: tree of arrays [batch, ...] of the texts, without a gradient.
      scale: multiplies the similarities.
      chunk: the most texts of a tile; None: as many as `ring.TILE` scores allow. A tile has the
        largest number of texts up to it that divides a device's.
      mesh: the devices that the rows lie on; None: one.
      keys: of the rows; equal ones are no negatives of each other; None: all are.
    """

    def scored(images: Side, texts: Side, scale: Array) -> tuple[Array, Array, Array]:
        both = similarity(images.learned, texts.learned, texts.fixed["mask"])
        to_texts, to_images = _distinct(images, texts, *(scale * scores for scores in both))
        return to_texts, to_images, jnp.where(pairs(images, texts), to_texts + to_images, 0.0)

    def statistics(images: Side, texts: Side, scale: Array, kept: Any) -> Any:
        to_texts, to_images, paired = scored(images, texts, scale)
        of_images, pair_scores = kept
        of_images = _merge(of_images, _log_sum(to_texts, axis=1))
        return (of_images, pair_scores + jnp.sum(paired, axis=1)), _log_sum(to_images, axis=0)

    def part(images: Side, texts: Side, scale: Array) -> Scalar:
        """Has the loss's gradient while the log-sum-exps are held fixed; not its value."""
        to_texts, to_images, paired = scored(images, texts, scale)
        shares = _shares(to_texts, images.fixed["sum"], axis=1)
        shares += _shares(to_images, texts.fixed["sum"], axis=0)
        return jnp.sum(shares - paired) / 2

    def local(images: Side, texts: Side, scale: Array, devices: int) -> tuple[Array, Any]:
        zeros = jnp.zeros_like(images.fixed["row"], jnp.float32)
        kept = _nothing(images.fixed["row"]), zeros
        none = _nothing(texts.fixed["row"])
        (of_images, pair_scores), of_texts = around(
            statistics, _merge, images, texts, scale, kept, none, devices
        )
        images = images._replace(fixed=images.fixed | {"sum": of_images})
        texts = texts._replace(fixed=texts.fixed | {"sum": of_texts})
        _, gradient = value_and_gradient(part, images, texts, scale, devices)
        of_texts = jax.tree.map(jnp.ravel, of_texts)  # without the tiles
        tops = of_images.top + of_texts.top - pair_scores
        return jnp.sum(tops + jnp.log(of_images.total) + jnp.log(of_texts.total)) / 2, gradient

    scale = jnp.asarray(scale, jnp.float32)
    return mean_loss(local, images, texts, mask, scale, chunk, mesh, keys)


def sigmoid(
    similarity: Similarity,
    images: Any,
    texts: Any,
    mask: Any,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    *,
    chunk: int | None = None,
    mesh: Mesh | None,
    keys: Keys | None = None,
) -> Scalar:
    """`contrastive.sigmoid_of_scores` of all pairs; the mean over both directions.

    Args:
      similarity, images, texts, mask, chunk, mesh, keys: see `softmax`.
      scale, bias: the scores are scale * similarity + bias.
    """

    def part(images: Side, texts: Side, shared: tuple[Array, Array]) -> Scalar:
        scale, bias = shared
        both = similarity(images.learned, texts.learned, texts.fixed["mask"])
        sign = jnp.where(pairs(images, texts), -1.0, 1.0)
        both = _distinct(images, texts, *(scale * scores + bias for scores in both))
        one, other = (jax.nn.softplus(sign * scores) for scores in both)
        return jnp.sum(one + other) / 2

    def local(images: Side, texts: Side, shared: Any, devices: int) -> tuple[Array, Any]:
        return value_and_gradient(part, images, texts, shared, devices)

    shared = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    return mean_loss(local, images, texts, mask, shared, chunk, mesh, keys)


def divergence(
    image: Float[Array, "batch width"],
    text: Float[Array, "batch width"],
    scale: Float[Array, ""] | float,
    teacher_image: Float[Array, "batch teacher_width"],
    teacher_text: Float[Array, "batch teacher_width"],
    teacher_scale: Float[Array, ""] | float,
    *,
    mesh: Mesh | None,
) -> Scalar:
    """`distillation.divergence_of_scores` of all pairs; the teacher's side has no gradient.

    Args:
      image, text, scale: the student's; its scores are scale * cosine.
      teacher_image, teacher_text, teacher_scale: the teacher's.
      mesh: the devices that the rows lie on; None: one.
    """

    def scored(images: Side, texts: Side, shared: Any) -> tuple[Array, Array]:
        student, teacher = images.learned
        scale, teacher_scale = shared
        scores = scale * contrastive.similarity(student, texts.learned)
        right = teacher_scale * contrastive.similarity(teacher, texts.fixed["mask"])
        return scores, jax.lax.stop_gradient(right)

    def statistics(images: Side, texts: Side, shared: Any, kept: Any) -> Any:
        both = scored(images, texts, shared)
        rows = tuple(_log_sum(scores, axis=1) for scores in both)
        return _merge_both(kept, rows), tuple(_log_sum(scores, axis=0) for scores in both)

    def part(images: Side, texts: Side, shared: Any) -> Scalar:
        """The value, and its gradient while the log-sum-exps are held fixed."""
        scores, right = scored(images, texts, shared)
        total = jnp.zeros((), jnp.float32)
        for side, axis in ((images, 1), (texts, 0)):
            of_student, of_teacher = side.fixed["sum"]
            shares = _shares(scores, of_student, axis)
            logs = _log_shares(scores, of_student, axis), _log_shares(right, of_teacher, axis)
            terms = jnp.exp(logs[1]) * (logs[1] - logs[0])
            # 0, with the gradient that the student's log-sum-exps would give.
            total += jnp.sum(terms + shares - jax.lax.stop_gradient(shares)) / 2
        return total

    def local(images: Side, texts: Side, shared: Any, devices: int) -> tuple[Array, Any]:
        kept, none = ((_nothing(side.fixed["row"]),) * 2 for side in (images, texts))
        of_images, of_texts = around(
            statistics, _merge_both, images, texts, shared, kept, none, devices
        )
        images = images._replace(fixed=images.fixed | {"sum": of_images})
        texts = texts._replace(fixed=texts.fixed | {"sum": of_texts})
        return value_and_gradient(part, images, texts, shared, devices)

    shared = jnp.asarray(scale, jnp.float32), jnp.asarray(teacher_scale, jnp.float32)
    images = image, jax.lax.stop_gradient(teacher_image)
    return mean_loss(local, images, text, teacher_text, shared, None, mesh, None)


def _distinct(images: Side, texts: Side, one: Array, other: Array) -> tuple[Array, Array]:
    """The scores of both directions, without those of other rows that are equal."""
    equals = others_that_equal(images, texts)
    if equals is None:
        return one, other
    return without_equal(one, equals), without_equal(other, equals)


def _nothing(rows: Array) -> LogSum:
    zeros = jnp.zeros_like(rows, jnp.float32)
    return LogSum(jnp.full_like(zeros, -jnp.inf), zeros)


def _log_sum(scores: Float[Array, "images texts"], axis: int) -> LogSum:
    top = jnp.max(scores, axis=axis)
    return LogSum(top, jnp.sum(jnp.exp(scores - jnp.expand_dims(top, axis)), axis=axis))


def _merge(one: LogSum, other: LogSum) -> LogSum:
    """Over the terms of both; one of them may have none."""
    top = jnp.maximum(one.top, other.top)
    parts = [each.total * jnp.exp(each.top - top) for each in (one, other)]
    return LogSum(top, parts[0] + parts[1])


def _merge_both(one: tuple[LogSum, ...], other: tuple[LogSum, ...]) -> tuple[LogSum, ...]:
    return tuple(_merge(*sums) for sums in zip(one, other, strict=True))


def _log_shares(scores: Array, of: LogSum, axis: int) -> Float[Array, "images texts"]:
    """The logarithm of `_shares`."""
    top, total = (jnp.expand_dims(part, axis) for part in of)
    return scores - top - jnp.log(total)


def _shares(scores: Array, of: LogSum, axis: int) -> Float[Array, "images texts"]:
    """What part of its sum each exponential is."""
    top, total = (jnp.expand_dims(part, axis) for part in of)
    return jnp.exp(scores - top) / total
