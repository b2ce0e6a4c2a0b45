"""The stages of a run as it walks: a step of its own for each, and the state over their borders."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from mlip_jax.core import stages
from mlip_jax.core.errors import UserError
from mlip_jax.core.stages import Stage
from mlip_jax.data.batches.training import train_batches, workers_for
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.devices import parallel
from mlip_jax.interop import positions
from mlip_jax.models import building
from mlip_jax.models.two_tower import TwoTower
from mlip_jax.training import accumulation, attention_choice
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.run import Run
from mlip_jax.training.state import TrainState, abstract_state
from mlip_jax.training.step import Metrics
from mlip_jax.training.step_cost import step_flops
from mlip_jax.training.teachers import Teachers

_RESAMPLED = "image_encoder/position"  # the end of what depends on the image size


@dataclass(frozen=True)
class Part:
    """A stage, and what its state and its step are made of.

    Attributes:
      stage: its config and its place.
      model_config: the stage's with the run's length of texts, of whose positions a shorter text
        takes the first.
      network: the model.
      optimizer: at the stage's rates.
      abstract: the state.
    """

    stage: Stage
    model_config: ConfigDict
    network: TwoTower
    optimizer: optax.GradientTransformation
    abstract: TrainState


def make_mesh(config: ConfigDict) -> Mesh:
    """The devices of a run, whose every batch they divide.

    Raises:
      UserError: when config.mesh does not fit the devices or a stage's batch.
    """
    configs = stages.plain(config) or [config]
    meshes = []
    for number, each in enumerate(configs, 1):
        with stages.naming(number, len(configs)):
            meshes.append(parallel.make_mesh(each.mesh, each.batch_size))
    return meshes[0]


def parts(run_stages: Sequence[Stage], tokenizer: Tokenizer, mesh: Mesh) -> tuple[Part, ...]:
    """What each stage of a run is made of, without its teachers.

    Raises:
      UserError: for a stage that cannot be, or whose state cannot be carried over its border.
    """
    context = run_stages[-1].config.model.text.context_length
    made: list[Part] = []
    for stage in run_stages:
        config = stage.config
        with stages.naming(stage.number, stage.count):
            accumulation.check(config.batch_size, config.accumulation, mesh)
            attention_choice.check(config, mesh)
            model_config = copy.deepcopy(config)
            model_config.model.text.context_length = context
            network = building.build_for(model_config, tokenizer)
        made.append(_part(stage, model_config, network, mesh))
    return tuple(made)


def _part(stage: Stage, model_config: ConfigDict, network: TwoTower, mesh: Mesh) -> Part:
    optimizer = optimizers.make(stage.config, stage.place)
    abstract = abstract_state(network, optimizer, model_config, mesh)
    return Part(stage, model_config, network, optimizer, abstract)


def taught(made: Sequence[Part], teachers: Teachers, mesh: Mesh) -> tuple[Part, ...]:
    """The same with what the models learn for their teachers.

    Raises:
      UserError: for a state that cannot be carried over a border, or too little memory for the
        batches of a stage.
    """
    result = tuple(
        _part(part.stage, part.model_config, teachers.pupil(part.network), mesh) for part in made
    )
    for before, after in itertools.pairwise(result):
        _check_border(before, after)
    for part in result:
        rows = len(parallel.local_rows(mesh, part.stage.config.batch_size))
        with stages.naming(part.stage.number, part.stage.count):
            workers_for(part.stage.config, rows, teachers.inputs)
    return result


def _check_border(before: Part, after: Part) -> None:
    def check(path: tuple[Any, ...], old: Any, new: Any) -> None:
        name = parallel.path_name(path)
        if old.shape != new.shape and not name.endswith(_RESAMPLED):
            raise UserError(
                f"config.stages: {name} is {list(old.shape)} in stage {before.stage.number} and "
                f"{list(new.shape)} in stage {after.stage.number}: a stage can change no image "
                "size of this model"
            )

    jax.tree_util.tree_map_with_path(check, before.abstract, after.abstract)


def carried(state: TrainState, after: TrainState) -> TrainState:
    """The state at the beginning of a stage, of the state at the end of the one before.

    Everything goes on, the optimizer's state too. Positions of another grid are resampled, and so
    are their moving averages. What the optimizer keeps of them stays within its range: a square
    that is below 0 has no root.

    Args:
      state: at the border.
      after: the next stage's, as `jax.ShapeDtypeStruct`s with shardings.
    """

    def carry(path: tuple[Any, ...], leaf: Array, wanted: jax.ShapeDtypeStruct) -> Array:
        if leaf.shape == wanted.shape:
            return leaf
        bounded = parallel.path_name(path[:1]) == "optimizer"
        resize = jax.jit(_resized, static_argnums=(1, 2), out_shardings=wanted.sharding)
        resized: Array = resize(leaf, wanted.shape[0], bounded)
        return resized

    result: TrainState = jax.tree_util.tree_map_with_path(carry, state, after)
    return result


def _resized(position: Array, side: int, bounded: bool) -> Array:
    resized = positions.resized(position, side)
    return jnp.clip(resized, jnp.min(position), jnp.max(position)) if bounded else resized


class Steps:
    """The compiled steps of a run, each called in its stage."""

    def __init__(
        self, made: Sequence[Part], compiled: Mapping[int, jax.stages.Compiled], teachers: Teachers
    ) -> None:
        """Takes the steps by the number of their stage; those of past stages may be missing."""
        self._parts = made
        self._stages = [part.stage for part in made]
        self._compiled = compiled
        self._costs = [1.0] * len(made)
        if len(made) > 1:
            self._costs = [
                step_flops(
                    part.network,
                    part.abstract.evaluated,
                    part.stage.config,
                    teachers,
                )
                for part in made
            ]

    @property
    def left(self) -> list[tuple[Part, jax.stages.Compiled]]:
        """The stages that are not over, with their steps."""
        return [
            (part, self._compiled[part.stage.number])
            for part in self._parts
            if part.stage.number in self._compiled
        ]

    def __call__(
        self, done: int, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, Metrics]:
        """Takes the run's step `done`, counted from 1; at a border the state is carried over."""
        stage = stages.at(self._stages, done)
        if stage.number > 1 and done == stage.place.first + 1:
            state = carried(state, self._parts[stage.number - 1].abstract)
        result: tuple[TrainState, Metrics] = self._compiled[stage.number](state, batch)
        return result

    def work(self, done: int) -> float:
        """What the first `done` steps cost, in a unit of its own: FLOPs, or steps of one stage."""
        return sum(
            cost * min(max(done - stage.place.first, 0), stage.steps)
            for cost, stage in zip(self._costs, self._stages, strict=True)
        )


def batches(run: Run, start: int) -> Generator[dict[str, np.ndarray]]:
    """The training batches of a process, from step `start` to the end of the run.

    What stands in a batch is a function of (seed, step) alone.
    """
    for stage in run.stages:
        if stage.last <= start:
            continue
        first = max(start, stage.place.first)
        # In steps of its own batch, a whole number: see `core.stages.of`.
        before = stage.place.samples // stage.config.batch_size
        own = train_batches(
            stage.config,
            run.source,
            run.tokenizer,
            start_step=before + first - stage.place.first,
            rows=parallel.local_rows(run.mesh, stage.config.batch_size),
            teachers=run.teachers.inputs,
        )
        with contextlib.closing(own):
            yield from itertools.islice(own, stage.last - first)
