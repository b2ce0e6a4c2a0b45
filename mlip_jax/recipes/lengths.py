"""How long a run is and how often it looks up, where that follows from its training set's size."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection

from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import check_length

BY_SET = -1  # of config.epochs and of the keys of INTERVALS
INTERVALS = (
    "optimizer.warmup_samples",
    "checkpoint.every_samples",
    "evaluation.every_samples",
)
_FEW, _MANY = 10_000, 1_000_000  # pairs: sets of fewer, and of more, get the passes of these
_PASSES_OF_FEW, _PASSES_OF_MANY = 60, 32
_LONGEST_WARMUP = 2500 * 4096  # samples, CLIP's
_LONGEST_UNSAVED = 1000 * 4096
_WARMUP_SHARE = 20  # a twentieth of the run
_COOLING = ("wsd", "rsqrt")  # schedules that end in a cooldown by themselves
_COOLDOWN_SHARE = 5  # a fifth of the run
_EVALUATIONS = 20  # at most, and none before a whole pass


def suitable_epochs(pairs: int) -> int:
    """Passes over a set of that size: 32 over large ones, as in the literature, 60 over small ones.

    Between 10,000 and a million pairs they fall with the logarithm of the size (a choice of ours).
    """
    place = math.log(max(pairs, 1) / _FEW) / math.log(_MANY / _FEW)
    share = min(max(place, 0.0), 1.0)
    return round(_PASSES_OF_FEW + share * (_PASSES_OF_MANY - _PASSES_OF_FEW))


def resolve(config: ConfigDict, pairs: int, before: ConfigDict | None = None) -> ConfigDict:
    """A copy of the config in which all lengths are numbers of samples, and config.epochs is 0.

    Args:
      config: validated. With epochs above 0, samples follows from it; with `BY_SET`, samples is the
        most that the run may take.
      pairs: of the training set.
      before: the config of a run that goes on: its warm-up stays, whatever the new length.

    Raises:
      UserError: when that many epochs are less than a batch, or more steps than a run may have.
    """
    config = copy.deepcopy(config)
    if config.epochs > 0:
        config.samples = round(config.epochs * pairs)
        check_length(config, f"config.epochs={config.epochs:g} of {pairs:,} pairs")
    elif config.epochs == BY_SET:
        config.samples = max(min(suitable_epochs(pairs) * pairs, config.samples), config.batch_size)
    config.epochs = 0.0
    settings = config.optimizer
    if before is not None and settings.warmup_samples == BY_SET:
        settings.warmup_samples = before.optimizer.warmup_samples
    interval = max(pairs, config.samples // _EVALUATIONS)
    lengths = {
        "optimizer.warmup_samples": min(_LONGEST_WARMUP, config.samples // _WARMUP_SHARE),
        "checkpoint.every_samples": min(_LONGEST_UNSAVED, interval),
        "evaluation.every_samples": interval,
    }
    for key in INTERVALS:
        section, _, name = key.partition(".")
        if config[section][name] == BY_SET:
            config[section][name] = lengths[key]
    if settings.cooldown_samples == BY_SET and settings.schedule in _COOLING:
        settings.cooldown_samples = config.samples // _COOLDOWN_SHARE
    left = config.samples - settings.warmup_samples
    if settings.cooldown_samples > max(left, 0):
        raise UserError(
            f"config.optimizer.cooldown_samples={settings.cooldown_samples:,} is longer than the "
            f"{max(left, 0):,} samples that are left of {config.samples:,} after the warm-up"
        )
    return config


def forget(config: ConfigDict) -> None:
    """Lets warm-up, cooldown and intervals follow from the length again, in place; 0 stays 0."""
    for key in (*INTERVALS, "optimizer.cooldown_samples"):
        section, _, name = key.partition(".")
        if config[section][name] > 0:
            config[section][name] = BY_SET


def settle(config: ConfigDict, overridden: Collection[str]) -> None:
    """Lets the length that the user gave count, whatever a recipe says about the other, in place.

    Args:
      config: with its overrides.
      overridden: their keys.

    Raises:
      UserError: when they say it twice.
    """
    if "samples" not in overridden:
        return
    if "epochs" in overridden and config.epochs:
        raise UserError(
            f"config.samples={config.samples} and config.epochs={config.epochs:g} both say how "
            "long the run is: leave one of them out"
        )
    config.epochs = 0.0
