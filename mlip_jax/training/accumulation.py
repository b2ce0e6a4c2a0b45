"""The gradient of a batch that is too large to keep: exact, with all of the batch's negatives.

A contrastive loss is no mean over examples, so gradients of parts' losses must not be averaged.
Instead all parts are embedded first, the loss and its gradient are taken on the embeddings of the
whole batch, and each part is embedded once more to bring its share of that gradient to the
parameters (Gao et al. 2021, arXiv 2101.06983). Random draws belong to rows (`models.dropout`), so
both passes, and a batch that is not cut, leave out the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from mlip_jax.parallel import BATCH

Embeddings = dict[str, Array]
Embed = Callable[[Any, Any], Embeddings]  # parameters, rows -> arrays with a row each
Objective = Callable[[Any, Embeddings], tuple[Array, Any]]  # parameters, ... -> loss, the rest


def value_and_gradient(
    embed: Embed, objective: Objective, params: Any, rows: Any, parts: int, mesh: Mesh | None
) -> tuple[tuple[Array, Any], Any]:
    """Loss, the rest, and the gradient of objective(params, embed(params, rows)).

    Args:
      embed: of each row by itself.
      objective: of all rows together.
      params: what the gradient is with respect to.
      rows: arrays [batch, ...].
      parts: what the batch is cut in; memory is that of one part and of all embeddings.
      mesh: the devices that the rows lie on; every part has rows of each.
    """
    cut = _cut(rows, parts, mesh)
    embeddings = _join(jax.lax.map(lambda part: embed(params, part), cut), mesh)
    smooth = _smooth(embeddings)
    (loss, rest), (gradient, cotangents) = jax.value_and_grad(
        lambda params, smooth: objective(params, embeddings | smooth), argnums=(0, 1), has_aux=True
    )(params, smooth)

    def add(total: Any, part: tuple[Any, Any]) -> tuple[Any, None]:
        own, cotangent = part
        _, pull = jax.vjp(lambda params: _smooth(embed(params, own)), params)
        return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

    gradient, _ = jax.lax.scan(add, gradient, (cut, _cut(cotangents, parts, mesh)))
    return (loss, rest), gradient


def _smooth(embeddings: Embeddings) -> Embeddings:
    """Those that have a gradient: a mask has none."""
    return {
        view: array
        for view, array in embeddings.items()
        if jnp.issubdtype(array.dtype, jnp.inexact)
    }


def _cut(rows: Any, parts: int, mesh: Mesh | None) -> Any:
    """[batch, ...] -> [parts, batch / parts, ...], a part holding some rows of every device."""
    shards = _shards(mesh)

    def cut(array: Array) -> Array:
        by_device = array.reshape(shards, parts, -1, *array.shape[1:])
        return _laid(by_device.swapaxes(0, 1).reshape(parts, -1, *array.shape[1:]), mesh, 1)

    return jax.tree.map(cut, rows)


def _join(parts: Any, mesh: Mesh | None) -> Any:
    """The inverse of `_cut`."""
    shards = _shards(mesh)

    def join(array: Array) -> Array:
        by_device = array.reshape(array.shape[0], shards, -1, *array.shape[2:])
        return _laid(by_device.swapaxes(0, 1).reshape(-1, *array.shape[2:]), mesh, 0)

    return jax.tree.map(join, parts)


def _shards(mesh: Mesh | None) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH[0]) if mesh else 1


def _laid(array: Array, mesh: Mesh | None, axis: int) -> Array:
    """The array with its rows, along `axis`, where the mesh has a batch's rows."""
    if _shards(mesh) == 1:
        return array
    spec = PartitionSpec(*[None] * axis, BATCH[0])
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))
