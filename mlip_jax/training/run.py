"""A run, and what it saves on its way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.registry import EVALUATIONS
from mlip_jax.core.stages import Stage, at
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.records import Source
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.evaluations.suites import PAIRS
from mlip_jax.inference import Model
from mlip_jax.storage.checkpoint import Checkpoints
from mlip_jax.training.callbacks import Callback
from mlip_jax.training.channel import Channel
from mlip_jax.training.signals import Stop
from mlip_jax.training.state import TrainState
from mlip_jax.training.teachers import Teachers

SCORE = "score"  # what the best checkpoints are chosen by


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the report."""

    config: ConfigDict  # of its end, where it has stages
    stages: tuple[Stage, ...]
    folder: Path
    mesh: Mesh
    source: Source
    validation: Source | None
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    home: Mesh  # the devices of this process
    model: Model  # for evaluation, at home; without parameters
    checkpoints: Checkpoints
    console: Console
    stop: Stop
    channel: Channel
    teachers: Teachers
    callbacks: tuple[Callback, ...]  # the user's

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.stages[-1].last

    def seen(self, done: int) -> int:
        """Pairs seen after `done` steps."""
        return at(self.stages, done).seen(done)

    def begins(self, step: int, start: int) -> Stage | None:
        """The stage that begins with a step, or goes on with it in a run that starts there.

        Of a run without stages none does.
        """
        stage = at(self.stages, step)
        first = step in (stage.place.first + 1, start + 1)
        return stage if first and stage.count > 1 else None

    def due(self, done: int, every_samples: int) -> bool:
        """Whether the step that was just done is the first past a multiple of `every_samples`."""
        return bool(every_samples) and (
            self.seen(done) // every_samples > self.seen(done - 1) // every_samples
        )

    def save(self, state: TrainState, done: int, figures: Mapping[str, float] | None) -> None:
        """Saves a checkpoint with all that a model needs to be used or trained further."""
        extras = {
            "config": schema.to_json(self.config),
            "tokenizer": self.tokenizer.to_json(),
            "preprocessing": self.preprocessing.to_dict(),
            "attribution": self.source.attribution,
            "teachers": self.teachers.identities,
        }
        try:
            best = {SCORE: score(self.config.checkpoint.best, figures)} if figures else {}
        except UserError:  # the steps up to here are not lost over it
            self.checkpoints.save(done, state, extras)
            raise
        self.checkpoints.save(done, state, extras, best)


def check_best(config: ConfigDict) -> None:
    """Raises UserError for a config.checkpoint.best that no evaluation while training can give."""
    best = config.checkpoint.best
    families = [
        name
        for name, family in EVALUATIONS.items()
        if family.at_intervals and config.evaluation[name]
    ]
    if config.model.critic == "concat":
        families.append(PAIRS)
    family, *rest = best.split("/")
    if best and (family not in families or len(rest) < 2):
        raise UserError(
            f"config.checkpoint.best={best!r} is no figure of an evaluation while training: "
            f"expected FAMILY/SET/FIGURE with a family of {', '.join(families) or 'none here'}"
        )


def score(best: str, figures: Mapping[str, float]) -> float:
    """What checkpoints are compared by: the figure `best`, or the mean of all recall@1.

    Without captions to retrieve by it is the mean of all zero-shot top-1; for a model that scores
    pairs, its accuracy.
    """
    if best:
        if best not in figures:
            raise UserError(
                f"config.checkpoint.best={best!r} is no figure of the evaluation: "
                f"{', '.join(figures)}{suggestion(best, figures)}"
            )
        return figures[best]
    for figure in ("_recall@1", "/top1", "/accuracy"):
        values = [value for key, value in figures.items() if key.endswith(figure)]
        if values:
            return float(np.mean(values))
    return -math.inf
