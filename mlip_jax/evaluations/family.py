"""What makes a family of evaluations: how a dataset is scored, and when that can be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from mlip_jax.evaluations.interface import Outcome

if TYPE_CHECKING:
    from mlip_jax.evaluations.sets import Sets


def _anything(sets: Sets, spec: str) -> None:
    del sets, spec


def _always(config: ConfigDict) -> bool:
    del config
    return True


@dataclass(frozen=True)
class Family:
    """One family of evaluations; config.evaluation names its datasets.

    Attributes:
      score: (sets, spec) -> what the model reaches on that set; None where the run's own validation
        set, the spec "validation", cannot give it.
      check: (sets, spec), raises UserError for a dataset that it cannot be done on.
      default_set: its dataset in a suite where the config names none.
      at_intervals: whether it is fast enough to be repeated while training.
      wants: what a validation set must have for it, and a dataset that has it.
      needs_joint_space: whether images and texts must lie in one space.
      fits: whether it can be done on a config's model at all; a suite leaves it out where not.
    """

    score: Callable[[Sets, str], Outcome | None]
    check: Callable[[Sets, str], None] = _anything
    default_set: str = "validation"
    at_intervals: bool = False
    needs_joint_space: bool = True
    wants: tuple[str, str] = ("labels", "folder:DIR")
    fits: Callable[[ConfigDict], bool] = _always
