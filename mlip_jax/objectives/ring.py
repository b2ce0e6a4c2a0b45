"""Sums over all pairs of a batch whose rows lie on several devices, in tiles around a ring.

A device keeps its images. The texts travel: a device scores its own first, then those of the device
after it, until every text has met every image. What is summed over the images for a text travels
along and is complete when the text is home again. So a device holds its own rows, one visiting
block of texts, and the scores of a tile of the two; no scores are kept for the backward pass.

The gradient is computed together with the value, and the backward pass only multiplies it: the
losses have no second derivatives and no forward mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from mlip_jax.devices.parallel import BATCH
from mlip_jax.objectives.contrastive import Scalar
from mlip_jax.objectives.equality import Keys, equal_to_all

AXES = BATCH[0]  # the mesh axes that a batch's rows lie on
# The most scores of a tile, 2 MiB. A larger block of a device's images and visiting texts is scored
# in tiles of fewer texts: memory then grows with a device's rows, not with their square. Tiles are
# equal, so rows whose number has no small factors make them needlessly small.
TILE = 2**19


class Side(NamedTuple):
    """Images or texts: trees of arrays whose first axis are the rows."""

    learned: Any
    fixed: dict[str, Any]


# images, texts, what all pairs share -> a tile's part of the loss
Part = Callable[[Side, Side, Any], Scalar]
# the same, what is kept of the images -> the latter with this tile, and sums of the texts in it
Visit = Callable[[Side, Side, Any, Any], tuple[Any, Any]]


def shards(mesh: Mesh | None) -> int:
    """Over how many devices a batch's rows lie; 1 without a mesh."""
    return math.prod(mesh.shape[axis] for axis in AXES) if mesh else 1


def pairs(images: Side, texts: Side) -> Bool[Array, "images texts"]:
    """True where an image meets its own text."""
    same: Array = images.fixed["row"][:, None] == texts.fixed["row"]
    return same


def others_that_equal(images: Side, texts: Side) -> Bool[Array, "images texts"] | None:
    """True where an image meets the text of another row that equals its own; None: not told."""
    keys = images.fixed["keys"]
    if keys is None:
        return None
    return equal_to_all(keys, texts.fixed["keys"]) & ~pairs(images, texts)


def mean_loss(
    local: Callable[[Side, Side, Any, int], tuple[Array, Any]],
    images: Any,
    texts: Any,
    mask: Any,
    shared: Any,
    chunk: int | None,
    mesh: Mesh | None,
    keys: Keys | None,
) -> Scalar:
    """The mean over the batch of what `local` finds on every device, with the gradient it finds.

    Args:
      local: (images, texts, shared, devices) -> the sum of this device's losses, and its gradients
        of the images, of the texts and of what all pairs share. Texts are in tiles, [tiles, texts,
        ...]; both sides' "row" in `fixed` is the pair's number and "keys" its keys, the texts'
        "mask" is `mask`.
      images, texts: trees of arrays [batch, ...], all of them with a gradient.
      mask: tree of arrays [batch, ...] of the texts, without a gradient.
      shared: tree of scalars with a gradient.
      chunk: see `blocks.softmax`.
      mesh: the devices that the rows lie on; None: one.
      keys: of the rows; see `Scoring`.
    """
    devices = shards(mesh)
    batch = jax.tree.leaves(images)[0].shape[0]

    def on_a_device(images: Any, texts: Any, shared: Any, fixed: Any, row: Array) -> Any:
        here = len(row)
        tiles = _tiles(here, chunk or max(TILE // here, 1))
        sides = (
            Side(_float32(images), {"row": row, "keys": fixed["keys"]}),
            jax.tree.map(
                lambda leaf: leaf.reshape(tiles, here // tiles, *leaf.shape[1:]),
                Side(texts, {"row": row} | fixed),
            ),
        )
        shared = jax.tree.map(lambda leaf: leaf[0], shared)
        losses, (of_images, of_texts, of_shared) = local(*sides, shared, devices)
        of_texts = jax.tree.map(lambda leaf: leaf.reshape(here, *leaf.shape[2:]), of_texts)
        losses, of_shared = jax.tree.map(lambda leaf: leaf[None], (losses, of_shared))
        return losses, (of_images, of_texts, of_shared)

    def forward(learned: Any, fixed: Any) -> tuple[Array, Any]:
        images, texts, shared = learned
        # A copy a device: what every device adds to the gradient is summed once, at the end.
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (devices,)), shared)
        arguments = images, texts, copies, fixed, jnp.arange(batch)
        everywhere = on_a_device
        if devices > 1:
            everywhere = jax.shard_map(on_a_device, mesh=mesh, in_specs=BATCH, out_specs=BATCH)
        losses, (of_images, of_texts, of_shared) = everywhere(*arguments)
        of_shared = jax.tree.map(jnp.sum, of_shared)
        gradient = jax.tree.map(
            lambda gradient, leaf: (gradient / batch).astype(leaf.dtype),
            (of_images, of_texts, of_shared),
            learned,
        )
        return jnp.sum(losses) / batch, gradient

    @jax.custom_vjp
    def loss(learned: Any, fixed: Any) -> Array:
        return forward(learned, fixed)[0]

    def backward(gradient: Any, cotangent: Array) -> tuple[Any, None]:
        scaled = jax.tree.map(lambda leaf: (cotangent * leaf).astype(leaf.dtype), gradient)
        return scaled, None

    loss.defvjp(forward, backward)
    return loss((images, texts, shared), {"mask": mask, "keys": keys})


def _tiles(rows: int, most: int) -> int:
    """Into how many tiles, all of the same size of at most `most`, the rows are split."""
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)


def value_and_gradient(
    part: Part, images: Side, texts: Side, shared: Any, devices: int
) -> tuple[Array, tuple[Any, Any, Any]]:
    """What this device's images add to the sum of `part` over all tiles, and its gradient.

    Returns:
      The sum; the gradients of the images, of the texts, in tiles, and this device's share of that
      of what all pairs share. All float32.
    """

    def visit(images: Side, texts: Side, shared: Any, kept: Any) -> tuple[Any, Any]:
        def of_learned(images_learned: Any, texts_learned: Any, shared: Any) -> Scalar:
            sides = images._replace(learned=images_learned), texts._replace(learned=texts_learned)
            return part(*sides, shared)

        value, (of_images, of_texts, of_shared) = jax.value_and_grad(of_learned, (0, 1, 2))(
            images.learned, texts.learned, shared
        )
        return _add(kept, (value, of_images, of_shared)), of_texts

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), tree)

    kept = zeros((images.fixed["row"][0], images.learned, shared))
    (value, of_images, of_shared), of_texts = around(
        visit, _add, images, texts, shared, kept, zeros(texts.learned), devices
    )
    return value, (of_images, of_texts, of_shared)


def around(
    visit: Visit,
    merge: Callable[[Any, Any], Any],
    images: Side,
    texts: Side,
    shared: Any,
    kept: Any,
    none: Any,
    devices: int,
) -> tuple[Any, Any]:
    """Lets every block of texts visit this device's images.

    Args:
      visit: scores one tile.
      merge: adds the sums of the same texts over two sets of images.
      images: this device's.
      texts: this device's own, in tiles, [tiles, texts, ...].
      shared: what all pairs share.
      kept: what `visit` keeps of the images, before the first visit.
      none: the sums of a block of texts over no images.
      devices: in the ring.

    Returns:
      What is kept of the images, and the sums of this device's own texts over all images.
    """
    to_the_one_before = [(device, (device - 1) % devices) for device in range(devices)]

    def send(tree: Any) -> Any:
        if devices == 1:
            return tree
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, AXES, to_the_one_before), tree)

    def hop(_: Array, state: tuple[Side, Any, Any]) -> tuple[Side, Any, Any]:
        texts, kept, sums = state
        # Both are on their way while the block is scored.
        following, arrived = send(texts), send(sums)

        def tile(kept: Any, texts: Side) -> tuple[Any, Any]:
            # They travel in their own type.
            texts = texts._replace(learned=_float32(texts.learned))
            return visit(images, texts, shared, kept)

        kept, of_texts = jax.lax.scan(tile, kept, texts)
        return following, kept, merge(arrived, of_texts)

    _, kept, sums = jax.lax.fori_loop(0, devices, hop, (texts, kept, none))
    return kept, send(sums)


def _add(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
