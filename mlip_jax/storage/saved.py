"""What runs have saved, read by others: steps, whole states, and parts of them.

A run's own checkpoints are in `checkpoint`, which tells how they lie on disk.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mlip_jax.core import places
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.models import adapters
from mlip_jax.models.two_tower import OF_TEACHERS
from mlip_jax.storage import seal, trees

FOLDER = "checkpoints"
STATE = "state"
NUMBER = re.compile(r"0|[1-9][0-9]*")  # a step, as a folder's name


def has_checkpoints(workdir: str | os.PathLike[str]) -> bool:
    """Whether a run has saved anything in a workdir, which need not exist."""
    return bool(saved_steps(workdir))


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """The steps of a run's checkpoints, the newest first."""
    folder = places.local(workdir).absolute() / FOLDER
    fetch_all_but_states(folder)
    found = (path for path in folder.glob("*") if NUMBER.fullmatch(path.name) and path.is_dir())
    return sorted((int(path.name) for path in found), reverse=True)


def set_aside(workdir: str | os.PathLike[str], steps: Sequence[int]) -> None:
    """Renames checkpoints to "replaced-STEP", the newest first; the run no longer counts them."""
    folder = places.local(workdir).absolute() / FOLDER
    for step in sorted(steps, reverse=True):
        aside = folder / f"replaced-{step}"
        places.remove(aside)
        places.move(folder / str(step), aside)


def check_state(workdir: str | os.PathLike[str], abstract_state: Any) -> Path:
    """The folder of the newest good checkpoint of another run, whose state must be such a one.

    Raises:
      UserError: when it holds no checkpoint, or one of another model: it names the tensor.
      RunError: when all are damaged.
    """
    _, extras = restore_fields(workdir, ("step",))
    path = places.local(workdir).absolute() / FOLDER / str(extras["step"])
    trees.check_tensors(path, _saved_tree(path), abstract_state)
    return path


def restore_state(workdir: str | os.PathLike[str], abstract_state: Any) -> tuple[Any, int]:
    """The newest good state of another run, which may be training right now. Changes nothing there.

    All processes of a run call it together.

    Args:
      workdir: the other run's folder.
      abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      The state, placed as asked, and its step.

    Raises:
      UserError, RunError: as `check_state`.
    """
    path = check_state(workdir, abstract_state)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        wanted = ocp.args.StandardRestore(trees.as_saved(_saved_tree(path), abstract_state))
        state = checkpointer.restore(path / STATE, args=wanted)
    return trees.as_wanted(state, abstract_state), int(path.name)


def _saved_tree(path: Path) -> Any:
    """What stands for the arrays of the state in a checkpoint's folder."""
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    return handler.metadata(path / STATE).tree


def restore_fields(
    workdir: str | os.PathLike[str], fields: Sequence[str] = ("params",), step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts of a saved state as numpy arrays, whatever devices wrote them. Changes nothing.

    Args:
      workdir: the run's folder; it may be training right now.
      fields: names of the state's fields. One that was None or absent comes back as {}.
      step: which checkpoint; None: the newest good one.

    Returns:
      The fields and the extras.

    Raises:
      UserError: if there is no such checkpoint.
      RunError: if every candidate is damaged.
    """
    folder = places.local(workdir).absolute() / FOLDER
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint yet: train first, or check the path")
    if step is not None and step not in steps:
        raise UserError(f"{folder} holds no checkpoint of step {step}, only {sorted(steps)}")
    for candidate in steps if step is None else [step]:
        path = folder / str(candidate)
        places.fetch(path)
        damage = seal.damage(path)
        if damage:
            warn(f"checkpoint {path} is damaged ({damage})")
            continue
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        tree = handler.metadata(path / STATE).tree
        wanted = {name: tree[name] for name in fields if tree.get(name)}
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
            restored = checkpointer.restore(
                path / STATE,
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=jax.tree.map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
                    ),
                    partial_restore=True,
                ),
            )
        handler = ocp.JsonCheckpointHandler(multiprocessing_options=_alone())
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
            extras = checkpointer.restore(path / "extras", args=ocp.args.JsonRestore())
        return {name: restored.get(name, {}) for name in fields}, extras
    raise RunError(f"no checkpoint in {folder} can be read: all are damaged")


def _alone() -> ocp.options.MultiprocessingOptions:
    """Has Orbax wait for no other process of the run: they need not read too."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"alone-{process}",
    )


def count_parameters(workdir: str | os.PathLike[str]) -> int | None:
    """Parameters of a run's newest checkpoint, of which only the shapes are read; None without one.

    Of what a damaged one does not tell, too.
    """
    steps = saved_steps(workdir)
    if not steps:
        return None
    path = places.local(workdir).absolute() / FOLDER / str(steps[0]) / STATE
    try:
        tree = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone()).metadata(path).tree
    except (OSError, ValueError):
        return None
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree["params"]))


def served(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a state's fields the variables to serve: averaged or slow parameters where there are.

    Adapters are added to their kernels. The projections to teachers' spaces serve training alone.
    """
    params = adapters.merged(fields["ema"] or fields["slow"] or fields["params"])
    kept = {name: part for name, part in params.items() if not name.startswith(OF_TEACHERS)}
    return {"params": kept, "batch_stats": fields["batch_stats"]}


def fetch_all_but_states(folder: Path) -> None:
    """Brings what is known of the checkpoints in a bucket, without their largest part."""
    places.fetch(folder, without=(STATE,), marked_by=seal.NAME)


def warn(message: str) -> None:
    """Tells the user of what was found and left out."""
    print("warning:", message, file=sys.stderr)
