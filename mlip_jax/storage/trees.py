"""The tree of a state as a checkpoint holds it against the one that a run wants.

They are the same but for what the optimizer keeps of a tower: it has no state of a frozen one, and
a run may start from another in which it was not frozen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mlip_jax.core.errors import UserError


def check_tensors(path: Path, tree: Any, abstract_state: Any) -> None:
    """Compares names, shapes and types: Orbax's own errors name no tensor.

    What the optimizer keeps of a tower may be on one side alone, see `as_saved`.

    Args:
      path: of the checkpoint, for messages.
      tree: what stands for the arrays in it.
      abstract_state: the state as `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: when the checkpoint is of another model; it names the tensor.
    """
    fields = getattr(abstract_state, "__dataclass_fields__", abstract_state)
    if lacking := sorted(set(fields) - set(tree)):
        raise UserError(
            f"checkpoint {path} keeps no {', '.join(lacking)}: an older mlip_jax wrote it; train "
            "it on with that version, or evaluate it with this one"
        )
    saved = _tensors(tree)
    wanted = _tensors(abstract_state)
    other = f"checkpoint {path} is of another model"
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved or name not in wanted:
            if _tower_of(name) in _towers(saved) ^ _towers(wanted):
                continue
            place = "the checkpoint" if name not in saved else "this config's model"
            raise UserError(f"{other}: {place} has no tensor {name}")
        if saved[name] != wanted[name]:
            raise UserError(
                f"{other}: tensor {name} is {saved[name]} there and {wanted[name]} in this "
                "config's model"
            )


_OF_TOWER = re.compile(r"optimizer/(?:.*/)?(image_encoder|text_encoder)/")


def _tower_of(name: str) -> str | None:
    """The tower that a tensor of the optimizer's state is of; None for any other tensor."""
    match = _OF_TOWER.match(name)
    return match[1] if match else None


def _towers(names: Iterable[str]) -> set[str]:
    """Those that an optimizer with tensors of these names keeps a state of."""
    return {tower for tower in map(_tower_of, names) if tower}


def as_saved(tree: Any, abstract_state: Any) -> Any:
    """What to ask Orbax for: the state, or, where a tower is frozen on one side, the saved tree.

    The optimizer has no state of a frozen tower, and a run may start from another in which it was
    not. Checkpoints of versions before this one hold zeros there.
    """
    wanted = named(abstract_state)
    if named(tree).keys() == wanted.keys():
        return abstract_state

    def asked(path: Any, leaf: Any) -> Any:
        spare = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=abstract_state.step.sharding)
        return wanted.get(_name(path), spare)

    return jax.tree_util.tree_map_with_path(asked, tree)


def as_wanted(restored: Any, abstract_state: Any) -> Any:
    """What Orbax gave in the state's structure; what was not saved is 0, as at a run's start."""
    saved = named(restored)
    if saved.keys() == named(abstract_state).keys():
        return restored  # as it was asked for

    def given(path: Any, leaf: Any) -> Any:
        if _name(path) in saved:
            return saved[_name(path)]
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(given, abstract_state)


def _tensors(tree: Any) -> dict[str, str]:
    """Name -> "type[shape]" of every array in a tree of arrays, or of what stands for them."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named(tree).items()}


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as "params/image_encoder/position"."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
