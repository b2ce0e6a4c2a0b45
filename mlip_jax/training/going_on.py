"""Runs that go on: made longer in their own folder, or as a branch in another one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import places, schema, stages
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import write_atomically
from mlip_jax.core.trained import START, read_config
from mlip_jax.storage.saved import check_state, restore_state, saved_steps, set_aside
from mlip_jax.training.optimizer import frozen_encoders, learning_rate
from mlip_jax.training.state import TrainState

# Keys that only say how the learning rate goes from here on.
_OF_LENGTH = {"samples", "optimizer.schedule", "optimizer.cooldown_samples"}
_RATES_COMPARED = 100_000  # at most; spread over the steps
# Keys of the model without a trace in its tensors that a branch may change all the same.
_FREE_IN_A_BRANCH = re.compile(
    r"model\.(prior_weight|(image|text)\.(dropout|drop_path|patch_dropout|remat)|image\.merging\..*"
    r"|(image\.|text\.)?pretrained)"
)
# What changes which arrays the optimizer and the averages have.
_OF_STATE = ("optimizer.name", "optimizer.lookahead.period", "optimizer.ema")


def accept(folder: Path, old: ConfigDict, new: ConfigDict, console: Console) -> None:
    """Lets a run go on under another config where all that it has learned stays what it would be.

    Its length, schedule and cooldown may change if every step of some checkpoint had the learning
    rate that the new config gives it. Later checkpoints are set aside, as "replaced-STEP".

    Args:
      folder: the run's, which is locked.
      old: as the folder has it.
      new: as the command gives it.
      console: told of what is done.

    Raises:
      UserError: when the run cannot go on so; it says how a branch can.
    """
    lines = schema.differences(old, new)
    if not lines:
        return
    words = "; ".join(lines)
    if not {line.partition(":")[0] for line in lines} <= _OF_LENGTH:
        raise UserError(
            f"{folder} holds a run of another config ({words}): give another --workdir, or the "
            f"old values to go on. --from={folder} --workdir=NEW starts a branch with new ones"
        )
    if new.stages:
        raise UserError(
            f"{folder} holds a run in stages, whose borders would move ({words}): give another "
            "--workdir, or the old values to go on"
        )
    steps = saved_steps(folder)
    if not steps:
        return
    last = new.samples // new.batch_size
    kept = next((step for step in steps if step <= last and _same_rates(old, new, step)), None)
    if kept is None:
        raise UserError(
            f"{folder} cannot go on so ({words}): its {steps[0]:,} steps had other learning rates "
            f"than this length and schedule give. {_advice(old, new, steps[0])}Or start a branch: "
            f"--from={folder} --workdir=NEW --config.samples={new.samples}"
        )
    set_aside(folder, [step for step in steps if step > kept])
    later = len([step for step in steps if step > kept])
    aside = f"; {later} later checkpoints are kept as checkpoints/replaced-STEP" if later else ""
    console.print(f"{places.shown(folder)} goes on from step {kept} with {words}{aside}")


def _advice(old: ConfigDict, new: ConfigDict, done: int) -> str:
    if new.optimizer.schedule != old.optimizer.schedule or new.optimizer.schedule == "cosine":
        return "A run of schedule='wsd' or 'rsqrt' can be made longer. "
    begins = new.samples - max(new.optimizer.cooldown_samples, 0)
    if begins < done * new.batch_size:
        return f"Its cooldown would begin at sample {begins:,}, which is past. "
    return ""


def _same_rates(old: ConfigDict, new: ConfigDict, steps: int) -> bool:
    """Whether the learning rates of the first `steps` steps are the same, bit for bit."""
    sampled = np.unique(np.linspace(0, steps - 1, min(steps, _RATES_COMPARED)).astype(np.int32))
    first, second = (learning_rate(config)(jnp.asarray(sampled)) for config in (old, new))
    return bool(np.array_equal(np.asarray(first), np.asarray(second)))


def check_branch(config: ConfigDict, abstract: TrainState) -> None:
    """Finds what keeps a run from starting from the one that config.start_from names.

    Raises:
      UserError: for a folder without checkpoints, another optimizer, another model (it names a
        tensor), or a key that changes what the weights mean.
    """
    source = places.local(config.start_from).expanduser()
    if config.stages:
        raise UserError(
            f"--from={source}: a branch keeps the optimizer's state, and config.stages begin "
            "another run: set config.stages=, or start from the weights alone, by a config file's "
            "pretrained=RUN"
        )
    lines = _changed(config)
    _check_stage(source, _source(config))
    for key in _OF_STATE:
        if key in lines and _keeps_other_arrays(key, config):
            raise UserError(
                f"--from={source}: config.{lines[key]} cannot change in a branch, which keeps the "
                "optimizer's state; a config file's pretrained=RUN starts from the weights alone"
            )
    check_state(source, abstract)
    for key, line in lines.items():
        if key.startswith("model.") and not _FREE_IN_A_BRANCH.fullmatch(key):
            raise UserError(
                f"--from={source}: config.{line} cannot change in a branch, whose weights were "
                "trained with the old value"
            )


def _check_stage(source: Path, config: ConfigDict) -> None:
    """Refuses a run that has not come to its last stage."""
    steps = saved_steps(source)
    own = stages.of(config)
    if steps and steps[0] <= own[-1].place.first:
        raise UserError(
            f"--from={source}: its newest checkpoint is of {stages.at(own, steps[0])}; a branch "
            "starts from the last stage"
        )


def _changed(config: ConfigDict) -> dict[str, str]:
    """The keys in which a branch differs from its source: key -> "key: old -> new"."""
    lines = schema.differences(_source(config), config)
    changed = {line.partition(":")[0]: line for line in lines}
    changed.pop("start_from", None)
    return changed


def _source(config: ConfigDict) -> ConfigDict:
    return read_config(places.local(config.start_from).expanduser())


def _keeps_other_arrays(key: str, config: ConfigDict) -> bool:
    before, after = (schema.flatten(each.to_dict())[key] for each in (_source(config), config))
    return key == "optimizer.name" or bool(before) != bool(after)


def branch(config: ConfigDict, abstract: TrainState) -> tuple[TrainState, list[str]]:
    """The state of the run that config.start_from names, at the start of a run of its own.

    Weights, averages and the optimizer's state are kept; the step, and with it the schedule,
    starts at 0.

    Returns:
      The state, and what the run starts from, in lines.

    Raises:
      UserError: as `check_branch`.
    """
    source = places.local(config.start_from).expanduser()
    restored, step = restore_state(source, abstract)

    def zero(leaf: Any) -> jax.Array:
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    def restart(part: Any, shape: Any) -> Any:
        return part._replace(count=zero(shape.count)) if _restarts(part) else part

    # The average of a tower that is frozen from here on would never reach its weights.
    frozen = frozen_encoders(config) if restored.ema else ()
    still = {name: jax.tree.map(jnp.copy, restored.params[name]) for name in frozen}
    state = restored.replace(
        step=zero(abstract.step),
        ema=restored.ema | still,
        optimizer=jax.tree.map(restart, restored.optimizer, abstract.optimizer, is_leaf=_restarts),
    )
    words = [f"  {line}" for line in _changed(config).values()]
    return state, [
        f"starts from {places.shown(source)} at step {step:,}: weights and optimizer",
        *words,
    ]


def _restarts(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def record_start(folder: Path, lines: list[str]) -> None:
    """Keeps what a run started from, for its report."""
    write_atomically(folder / START, json.dumps(lines, indent=2, ensure_ascii=False) + "\n")
