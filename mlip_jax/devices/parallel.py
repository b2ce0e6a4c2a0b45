"""Devices: the mesh, the rules that shard parameters over it, host arrays to global arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError, suggestion

AXES = ("data", "fsdp", "tensor")
# A batch is split over every device that does not share its parameters' columns.
BATCH = PartitionSpec(("data", "fsdp"))

Rule = tuple[str, PartitionSpec]
# The first pattern that is found in a parameter's path says how its axes are sharded. An axis that
# a mesh does not divide stays whole. The optimizer's copies end in the same path and follow.
RULES: tuple[Rule, ...] = (
    (r"(qkv|up|patch|projection|hidden|shortcut)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out|down|output)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"convolution\w*/kernel$", PartitionSpec(None, None, "fsdp", "tensor")),
    (r"text_encoder/embedding$", PartitionSpec("fsdp", "tensor")),
    (r"predictors_\w+/embedding$", PartitionSpec("fsdp", "tensor")),
    (r"filter$", PartitionSpec(None, None, "fsdp")),
    (r"", PartitionSpec()),
)


def make_mesh(
    shape: ConfigDict, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The (data, fsdp, tensor) mesh over the devices; one axis may be -1, "all that remain".

    Args:
      shape: config.mesh.
      batch_size: the global batch.
      devices: all of this run's, unless they are given.

    Raises:
      UserError: when the axes do not multiply to the devices or do not divide the batch.
    """
    sizes = [int(shape[axis]) for axis in AXES]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh ({axes}): each axis at least 1, and at most one -1")
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if math.prod(sizes) != count:
        raise UserError(f"config.mesh ({axes}) does not fit the {count} devices here")
    shards = sizes[0] * sizes[1]
    if batch_size % shards:
        below = batch_size // shards * shards
        nearest = f"{below} or {below + shards}" if below else f"{shards}"
        raise UserError(
            f"config.batch_size={batch_size} is not divided by data*fsdp={shards} of the mesh; "
            f"nearest: {nearest}"
        )
    # jax.make_mesh splits an axis of a chips' torus over two axes of the mesh on v5e alone.
    placed = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def home_mesh(mesh: Mesh) -> Mesh:
    """The mesh for what one process does without the others: its own devices.

    With one process it is `mesh`. Parameters are sharded over it where they are over `mesh`.
    """
    if jax.process_count() == 1:
        return mesh
    devices = jax.local_devices()
    sharded = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    sizes = (1, len(devices), 1) if sharded else (len(devices), 1, 1)
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, types, devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as "image_encoder/position"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def sharding_rules(config_rules: Sequence[str], params: Any) -> tuple[Rule, ...]:
    """The rules of a run: those of config.sharding, then `RULES`.

    Args:
      config_rules: each "PATTERN=AXES": what is found in a parameter's path, and a mesh axis for
        each axis of the array with spaces between, "-" for one that stays whole, nothing for an
        array that does.
      params: the parameters that they are for.

    Raises:
      UserError: for a rule that is none, matches no parameter or has more axes than one that it
        matches.
    """
    shapes = {
        path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return (*(_rule(text, shapes) for text in config_rules), *RULES)


def _rule(text: str, shapes: Mapping[str, tuple[int, ...]]) -> Rule:
    mistake = f"config.sharding: {text!r}"
    pattern, equals, axes = text.rpartition("=")
    # Paths of the optimizer's copies begin otherwise.
    if not equals or not pattern or pattern.startswith("^"):
        raise UserError(
            f"{mistake} is not PATTERN=AXES, such as 'mlp/up/kernel$=- tensor', with a pattern "
            "that is searched in the whole path"
        )
    names = axes.split()
    for name in names:
        if name not in (*AXES, "-"):
            raise UserError(
                f"{mistake}: {name!r} is none of {', '.join(AXES)}, -{suggestion(name, AXES)}"
            )
    if len({*names} - {"-"}) != len(names) - names.count("-"):
        raise UserError(f"{mistake} names an axis of the mesh twice")
    try:
        matched = [path for path in shapes if re.search(pattern, path)]
    except re.error as error:
        raise UserError(f"{mistake} is no regular expression: {error}") from error
    if not matched:
        raise UserError(
            f"{mistake} matches no parameter; they are such as {', '.join(list(shapes)[:3])}"
            f"{suggestion(pattern, shapes)}"
        )
    for path in matched:
        if len(names) > len(shapes[path]):
            raise UserError(
                f"{mistake} has {len(names)} axes, but {path} has the shape {shapes[path]}"
            )
    return pattern, PartitionSpec(*(None if name == "-" else name for name in names))


def batch_shards(mesh: Mesh, accumulation: int = 1) -> int:
    """How many parts a batch's rows are embedded in: the data axis times the fsdp axis.

    Under accumulation the tensor axis shares rows too, and each device takes its own in that many
    parts.
    """
    if accumulation > 1:
        return mesh.size * accumulation
    return mesh.shape["data"] * mesh.shape["fsdp"]


def sharding_of(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule] = RULES
) -> NamedSharding:
    """The sharding of the parameter (or the optimizer's copy of it) at `path`."""
    spec = next(spec for pattern, spec in rules if re.search(pattern, path))
    # 1x1 convolutions are kept as matrices: what a rule says of the last axes holds for them.
    spec = spec[-len(shape) :] if len(spec) > len(shape) > 0 else spec
    axes = [
        axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(mesh, PartitionSpec(*axes))


def tree_shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """Shardings for a tree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding_of(path_name(path), leaf.shape, mesh, rules), tree
    )


def sharding_table(
    params: Any, mesh: Mesh, rules: Sequence[Rule] = RULES
) -> list[tuple[str, str, int]]:
    """Rows of (pattern, resolved axes, number of parameters), for the summary."""
    rows: dict[tuple[str, str], int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        pattern = next(pattern for pattern, _ in rules if re.search(pattern, name))
        spec = sharding_of(name, leaf.shape, mesh, rules).spec
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


def memory_limit() -> int | None:
    """Bytes that programs may take of a device of this host; None where it does not say (CPUs)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this process feeds, in the order that `global_batch` takes.

    They need not follow each other: a mesh may follow the wires between chips, not the hosts.
    Processes that share rows, by the tensor axis, each feed them.
    """
    shards = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({index[0].indices(batch_size)[:2] for index in shards if index})
    return np.concatenate([np.arange(*span) for span in spans])


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, rows sharded over the devices."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in batch.items()
    }
