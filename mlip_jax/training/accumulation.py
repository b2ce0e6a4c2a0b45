"""The gradient of a batch that is too large to keep: exact, with all of the batch's negatives.

A contrastive loss is no mean over examples, so gradients of parts' losses must not be averaged.
Instead all parts are embedded first, the loss and its gradient are taken on the embeddings of the
whole batch, and each part is embedded once more to bring its share of that gradient to the
parameters (Gao et al. 2021, arXiv 2101.06983). Random draws belong to rows (`models.dropout`), so
both passes, and a batch that is not cut, leave out the same.

On a mesh every device goes through its own rows alone. It holds the whole parameters meanwhile, and
a whole gradient, which the devices add up once, after the last part: no part waits for another
device. That is also why the tensor axis shares rows here, and not columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from mlip_jax.core.errors import UserError
from mlip_jax.devices import parallel

Embeddings = dict[str, Array]
Embed = Callable[[Any, Any], Embeddings]  # parameters, rows -> arrays with a row each
Objective = Callable[[Any, Embeddings], tuple[Array, Any]]  # parameters, ... -> loss, the rest

_ROWS = PartitionSpec(parallel.AXES)  # over every device; neighbours on the tensor axis share rows
_WHOLE = PartitionSpec()


def check(batch_size: int, parts: int, mesh: Mesh | None) -> None:
    """Raises UserError for a batch that its devices and parts do not divide."""
    devices = mesh.size if mesh else 1
    if parts > 1 and batch_size % (parts * devices):
        raise UserError(
            f"config.batch_size={batch_size} is no multiple of config.accumulation={parts} parts "
            f"on each of the mesh's {devices} devices"
        )


def value_and_gradient(
    embed: Embed,
    objective: Objective,
    params: Any,
    rows: Any,
    parts: int,
    mesh: Mesh | None,
    rules: Sequence[parallel.Rule] = parallel.RULES,
) -> tuple[tuple[Array, Any], Any]:
    """Loss, the rest, and the gradient of objective(params, embed(params, rows)).

    Args:
      embed: of each row by itself.
      objective: of all rows together.
      params: what the gradient is with respect to.
      rows: arrays [batch, ...].
      parts: what a device's rows are cut in; memory is that of one part and of all embeddings.
      mesh: the devices that the rows lie on; None: one.
      rules: how the parameters, and so their gradient, are sharded.
    """

    def pull_back(params: Any, rows: Any, cotangents: Embeddings) -> Any:
        """This device's gradient, [1, ...]."""

        def add(total: Any, part: tuple[Any, Embeddings]) -> tuple[Any, None]:
            part_rows, cotangent = part
            _, pull = jax.vjp(lambda params: _smooth(embed(params, part_rows)), params)
            return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

        none = jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, none, _cut((rows, cotangents), parts))
        return jax.tree.map(lambda leaf: leaf[None], total)

    if mesh and mesh.size > 1:
        # Gathered here, where both passes can share them. Within them nothing varies that should
        # not, but a gradient of what is the same everywhere would be summed in every part.
        whole = jax.lax.with_sharding_constraint(params, parallel.replicated(mesh))
        pull_back = _spread(pull_back, mesh, in_specs=(_WHOLE, _ROWS, _ROWS))
    else:
        whole = params
    embeddings = embedded(embed, whole, rows, parts, mesh)
    smooth = _smooth(embeddings)
    (loss, rest), (gradient, cotangents) = jax.value_and_grad(
        lambda params, smooth: objective(params, embeddings | smooth), argnums=(0, 1), has_aux=True
    )(params, smooth)
    of_devices = pull_back(whole, rows, cotangents)
    gradient = jax.tree.map(
        lambda direct, parts: direct + jnp.sum(parts, axis=0), gradient, of_devices
    )
    if mesh:
        shardings = parallel.tree_shardings(gradient, mesh, rules)
        gradient = jax.lax.with_sharding_constraint(gradient, shardings)
    return (loss, rest), gradient


def embedded(embed: Embed, params: Any, rows: Any, parts: int, mesh: Mesh | None) -> Embeddings:
    """embed(params, rows), part by part; the arguments are those of `value_and_gradient`."""

    def embed_parts(params: Any, rows: Any) -> Embeddings:
        in_parts = jax.lax.map(lambda part: embed(params, part), _cut(rows, parts))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), in_parts)

    if mesh and mesh.size > 1:
        params = jax.lax.with_sharding_constraint(params, parallel.replicated(mesh))
        embed_parts = _spread(embed_parts, mesh, in_specs=(_WHOLE, _ROWS))
    return embed_parts(params, rows)


def _spread(function: Callable[..., Any], mesh: Mesh, in_specs: Any) -> Callable[..., Any]:
    """The function on every device, of its own rows."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=_ROWS, check_vma=False)


def _smooth(embeddings: Embeddings) -> Embeddings:
    """Those that have a gradient: a mask has none."""
    return {
        view: array
        for view, array in embeddings.items()
        if jnp.issubdtype(array.dtype, jnp.inexact)
    }


def _cut(rows: Any, parts: int) -> Any:
    """[rows, ...] -> [parts, rows / parts, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), rows)
