"""The losses of a batch whose rows lie on the devices of a mesh, without a gather.

Softmax and sigmoid, of embeddings and of tokens, compare all pairs: blocks of texts go around a
ring (`blocks`). The Jensen-Shannon bound compares few. A shift pairs each image with a text a few
rows further on. The rows of a batch lie on the devices in order, so all that a device lacks are the
first rows of its neighbour's texts: they come by one exchange, and go back by one in the gradient.

Values and gradients equal the one-device losses, on any mesh: what shares a device's rows along the
tensor axis computes the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from mlip_jax.devices.parallel import BATCH
from mlip_jax.objectives import blocks, contrastive, tokenwise
from mlip_jax.objectives.contrastive import Scalar, check_shifts, jsd_of_scores, shifted_scores
from mlip_jax.objectives.equality import Keys, equal, without_equal
from mlip_jax.objectives.ring import AXES, shards
from mlip_jax.objectives.tokenwise import ImageTokens, Mask, TextTokens, Weights

_EVERYWHERE = PartitionSpec()
_SHIFTED = PartitionSpec(None, AXES)  # [1 + shifts, batch]


def softmax_contrastive(
    image: Float[Array, "batch width"],
    text: Float[Array, "batch width"],
    scale: Float[Array, ""] | float,
    *,
    mesh: Mesh | None,
) -> Scalar:
    """`contrastive.softmax_contrastive` in blocks around a ring of the mesh's devices.

    Without a mesh, or where all rows lie on one device, that device goes through all of the blocks.
    """
    return blocks.softmax(paired, image, text, None, scale, mesh=mesh)


def sigmoid_contrastive(
    image: Float[Array, "batch width"],
    text: Float[Array, "batch width"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    *,
    mesh: Mesh | None,
) -> Scalar:
    """`contrastive.sigmoid_contrastive` in blocks, as in `softmax_contrastive`."""
    return blocks.sigmoid(paired, image, text, None, scale, bias, mesh=mesh)


def paired(image: Array, text: Array, _: None) -> tuple[Array, Array]:
    """A `blocks.Similarity` of embeddings."""
    scores = contrastive.similarity(image, text)
    return scores, scores


def tokens_paired(images: tuple[Array, Array], texts: Array, mask: Array) -> tuple[Array, Array]:
    """A `blocks.Similarity` of tokens and their weights with words."""
    tokens, weights = images
    return tokenwise.block_similarity(tokens, texts, weights, mask)


def jsd(
    image: Float[Array, "batch width"],
    text: Float[Array, "batch width"],
    scale: Float[Array, ""] | float,
    shifts: int = 1,
    *,
    odds: float = 1.0,
    bias: Float[Array, ""] | float = 0.0,
    mesh: Mesh | None,
) -> Scalar:
    """`contrastive.jsd` of a batch whose rows lie on the mesh's data and fsdp axes, if it has one.

    Raises:
      ValueError: unless 1 <= shifts < batch.
    """
    of_pairs = functools.partial(jsd_of_scores, odds=odds)
    return over_shifts(of_pairs, image, text, scale, bias, shifts, mesh=mesh)


def over_shifts(
    of_pairs: Callable[[Array], Scalar],
    image: Float[Array, "batch width"],
    text: Float[Array, "batch width"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    shifts: int,
    *,
    mesh: Mesh | None,
    keys: Keys | None = None,
) -> Scalar:
    """A loss on the scaled scores of images with their own and the next `shifts` texts, as `jsd`.

    Args:
      of_pairs: scores [1 + shifts, rows] -> their mean loss.
      image: L2-normalised.
      text: L2-normalised.
      scale: multiplies cosines.
      bias: is added to them.
      shifts: negatives a positive.
      mesh: the devices that the rows lie on; None: one.
      keys: of the rows; equal ones are no negatives of each other; None: all are.

    Raises:
      ValueError: unless 1 <= shifts < batch.
    """
    check_shifts(shifts, image.shape[0])

    def local(
        image: Array,
        text: Array,
        scale: Array | float,
        bias: Array | float,
        equals: Array | None,
    ) -> Array:
        scores = shifted_scores(image, _followed(text, shifts, mesh), scale, shifts)
        loss = of_pairs(distinct(scores + bias, equals))
        return loss if shards(mesh) == 1 else jax.lax.pmean(loss, AXES)

    equals = equal_at_shifts(keys, shifts, mesh)
    if shards(mesh) == 1:
        return local(image, text, scale, bias, equals)
    specs = BATCH, BATCH, _EVERYWHERE, _EVERYWHERE, _SHIFTED
    everywhere = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=_EVERYWHERE)
    return everywhere(image, text, jnp.asarray(scale), jnp.asarray(bias), equals)


def tokens_over_shifts(
    of_pairs: Callable[[Array], Scalar],
    image_tokens: ImageTokens,
    text_tokens: TextTokens,
    image_weights: Weights,
    text_mask: Mask,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    shifts: int,
    *,
    mesh: Mesh | None,
    keys: Keys | None = None,
) -> Scalar:
    """`over_shifts` on token-level similarity: the mean over its two directions.

    Raises:
      ValueError: unless 1 <= shifts < batch.
    """
    check_shifts(shifts, image_tokens.shape[0])
    equals = equal_at_shifts(keys, shifts, mesh)
    if shards(mesh) == 1:
        following = (contrastive.followed(rows, shifts) for rows in (text_tokens, text_mask))
        text_tokens, text_mask = following
        scores = tokenwise.shifted_scores(
            image_tokens, text_tokens, image_weights, text_mask, shifts
        )
        return tokenwise.directed(of_pairs, distinct(scale * scores + bias, equals))

    def local(
        image: Array,
        text: Array,
        weights: Array,
        mask: Array,
        scale: Array,
        bias: Array,
        equals: Array | None,
    ) -> Array:
        # The mask travels as one more column, so that one exchange brings both.
        packed = jnp.concatenate([text, mask[..., None].astype(text.dtype)], axis=-1)
        packed = _followed(packed, shifts, mesh)
        scores = tokenwise.shifted_scores(
            image, packed[..., :-1], weights, packed[..., -1] > 0, shifts
        )
        scores = distinct(scale * scores + bias, equals)
        loss: Array = jax.lax.pmean(tokenwise.directed(of_pairs, scores), AXES)
        return loss

    specs = BATCH, BATCH, BATCH, BATCH, _EVERYWHERE, _EVERYWHERE, _SHIFTED
    everywhere = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=_EVERYWHERE)
    shared = jnp.asarray(scale), jnp.asarray(bias)
    return everywhere(image_tokens, text_tokens, image_weights, text_mask, *shared, equals)


def equal_at_shifts(
    keys: Keys | None, shifts: int, mesh: Mesh | None
) -> Bool[Array, "shifts1 batch"] | None:
    """Whether a row equals the one 0 to `shifts` rows further on, not counting itself."""
    if keys is None:
        return None

    def local(keys: Keys) -> Array:
        count = keys.record.shape[0]
        following = jax.tree.map(lambda key: _followed(key, shifts, mesh), keys)
        equals = [jnp.zeros_like(keys.record, bool)]
        for shift in range(1, shifts + 1):
            others = jax.tree.map(lambda key, at=shift: key[at : at + count], following)
            equals.append(equal(keys, others))
        return jnp.stack(equals)

    if shards(mesh) == 1:
        return local(keys)
    return jax.shard_map(local, mesh=mesh, in_specs=(BATCH,), out_specs=_SHIFTED)(keys)


def distinct(scores: Array, equals: Bool[Array, "shifts1 batch"] | None) -> Array:
    """Scores [..., 1 + shifts, batch] without those of equal rows, where these are told."""
    return scores if equals is None else without_equal(scores, equals)


def shifted(
    rows: Float[Array, "batch width"], shifts: int, mesh: Mesh | None
) -> Float[Array, "shifts1 batch width"]:
    """The rows, and the rows rolled by 1 to `shifts`: what pairwise critics score images with."""

    def local(rows: Array) -> Array:
        count = rows.shape[0]
        following = _followed(rows, shifts, mesh)
        return jnp.stack([following[shift : shift + count] for shift in range(shifts + 1)])

    check_shifts(shifts, rows.shape[0])
    if shards(mesh) == 1:
        return local(rows)
    return jax.shard_map(local, mesh=mesh, in_specs=BATCH, out_specs=_SHIFTED)(rows)


def _followed(rows: Array, count: int, mesh: Mesh | None) -> Array:
    """A device's rows and the `count` rows after them, which begin on the next device."""
    devices = shards(mesh)
    if devices == 1:
        return contrastive.followed(rows, count)
    here = rows.shape[0]
    parts = [rows]
    for hop in range(1, -(-count // here) + 1):  # one, unless there are more shifts than rows here
        needed = min(count - (hop - 1) * here, here)
        to_the_one_before = [(device, (device - hop) % devices) for device in range(devices)]
        parts.append(jax.lax.ppermute(rows[:needed], AXES, to_the_one_before))
    return jnp.concatenate(parts)
