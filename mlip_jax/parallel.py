"""Devices: the mesh, the rules that shard parameters over it, host arrays to global arrays."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mlip_jax.config import UserError

AXES = ("data", "fsdp", "tensor")
# A batch is split over every device that does not share its parameters' columns.
BATCH = PartitionSpec(("data", "fsdp"))

# The first pattern that is found in a parameter's path says how its axes are sharded. An axis that
# a mesh does not divide stays whole. The optimizer's copies end in the same path and follow.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(qkv|up|patch|projection|hidden|shortcut)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out|down|output)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"convolution\w*/kernel$", PartitionSpec(None, None, "fsdp", "tensor")),
    (r"text_encoder/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"filter$", PartitionSpec(None, None, "fsdp")),
    (r"", PartitionSpec()),
)


def make_mesh(shape: ConfigDict, batch_size: int) -> Mesh:
    """The (data, fsdp, tensor) mesh over all devices; one axis may be -1, "all that remain".

    Raises:
      UserError: when the axes do not multiply to the devices or do not divide the batch.
    """
    sizes = [int(shape[axis]) for axis in AXES]
    devices = jax.device_count()
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh ({given}): each axis at least 1, and at most one -1")
    if -1 in sizes and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    if math.prod(sizes) != devices:
        raise UserError(f"config.mesh ({given}) does not fit the {devices} devices here")
    shards = sizes[0] * sizes[1]
    if batch_size % shards:
        below = batch_size // shards * shards
        nearest = f"{below} or {below + shards}" if below else f"{shards}"
        raise UserError(
            f"config.batch_size={batch_size} is not divided by data*fsdp={shards} of the mesh; "
            f"nearest: {nearest}"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as "image_encoder/position"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of the parameter (or the optimizer's copy of it) at `path`, by `RULES`."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, path))
    # 1x1 convolutions are kept as matrices: what a rule says of the last axes holds for them.
    spec = spec[-len(shape) :] if len(spec) > len(shape) > 0 else spec
    axes = [
        axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(mesh, PartitionSpec(*axes))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding_of(path_name(path), leaf.shape, mesh), tree
    )


def sharding_table(params: Any, mesh: Mesh) -> list[tuple[str, str, int]]:
    """Rows of (pattern, resolved axes, number of parameters), for the summary."""
    rows: dict[tuple[str, str], int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        pattern = next(pattern for pattern, _ in RULES if re.search(pattern, name))
        spec = sharding_of(name, leaf.shape, mesh).spec
        resolved = ", ".join(str(axis) for axis in spec) or "replicated"
        key = (pattern or "all others", resolved)
        rows[key] = rows.get(key, 0) + math.prod(leaf.shape)
    return [(pattern, resolved, count) for (pattern, resolved), count in rows.items()]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, rows sharded over the devices."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in batch.items()
    }
