"""Rows of a batch that are no negatives of each other: of the same record, or of equal texts.

Whether two rows are equal is told by keys, whole numbers that travel with the rows. A score of an
image with the text of an equal row is set so low that no loss feels it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

# Scaled scores lie within some hundreds: e to this is 0, and so is a hinge or a softplus of it.
LOWEST = -1e9


class Keys(NamedTuple):
    """What tells equal rows."""

    record: UInt32[Array, "rows"]  # the dataset's record that a row shows
    text: UInt32[Array, "rows 2"] | None  # of its token ids; None: equal texts stay negatives


def text_keys(token_ids: Int[Array, "rows context"]) -> UInt32[Array, "rows 2"]:
    """64 bits that stand for a text's token ids: equal ones are equal."""
    # Fixed: the keys of all devices and of all runs are of one making.
    factors = np.random.default_rng(0).integers(0, 2**32, (token_ids.shape[1], 2), np.uint32) | 1
    bits = token_ids.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = bits ^ (bits >> 13)
    return jnp.sum(bits[:, :, None] * factors, axis=1, dtype=jnp.uint32)


def equal(one: Keys, other: Keys) -> Bool[Array, "*pairs"]:
    """Which rows are equal, of keys whose shapes broadcast; `text` with one axis more."""
    same: Array = one.record == other.record
    if one.text is not None and other.text is not None:
        same |= jnp.all(one.text == other.text, axis=-1)
    return same


def equal_to_all(rows: Keys, columns: Keys) -> Bool[Array, "rows columns"]:
    """Which rows equal which others."""
    return equal(jax.tree.map(lambda key: key[:, None], rows), columns)


def without_equal(
    scores: Float[Array, "*more rows columns"], equals: Bool[Array, "rows columns"]
) -> Float[Array, "*more rows columns"]:
    """Scores in which those of equal rows are felt by no loss."""
    return jnp.where(equals, LOWEST, scores)


def false_negatives(
    record: UInt32[Array, "rows"], text: UInt32[Array, "rows 2"]
) -> Float[Array, ""]:
    """How many pairs of an image with another row's text are right, by the record or by the text.

    By sorting: comparing all with all would cost the square of the batch.
    """
    one, other = text.T
    return _equal_pairs(record) + _equal_pairs(one, other) - _equal_pairs(record, one, other)


def _equal_pairs(*keys: UInt32[Array, "rows"]) -> Float[Array, ""]:
    """Ordered pairs of different rows that are equal in all keys."""
    in_order = jax.lax.sort(keys, num_keys=len(keys))
    place = jnp.arange(len(keys[0]))
    new = place == 0
    for key in in_order:
        new |= key != jnp.roll(key, 1)
    first = jax.lax.cummax(jnp.where(new, place, 0))
    return 2.0 * jnp.sum((place - first).astype(jnp.float32))
