"""The subcommand train."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from mlip_jax.training import loop
from mlip_jax.training.callbacks import Callback
from mlip_jax.training.profile import Profile
from mlip_jax.training.trackers import trackers


def train(config: ConfigDict, workdir: str | Path, profile: int = 0, track: str = "") -> int:
    """Trains by `loop.train`; returns the exit code.

    Args:
      config: validated.
      workdir: the run's folder; one that holds this run is resumed.
      profile: how many steps are traced into its folder "profile".
      track: names of trackers with commas between; see `trackers.TRACKERS`.
    """
    callbacks: list[Callback] = [Profile(profile)] if profile else []
    callbacks += trackers(track)
    return loop.train(config, workdir, callbacks=callbacks).code
