"""The subcommand train."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from mlip_jax.training import loop
from mlip_jax.training.profile import Profile


def train(config: ConfigDict, workdir: str | Path, profile: int = 0) -> int:
    """Trains by `loop.train`; returns the exit code.

    Args:
      config: validated.
      workdir: the run's folder; one that holds this run is resumed.
      profile: how many steps are traced into its folder "profile".
    """
    callbacks = [Profile(profile)] if profile else []
    return loop.train(config, workdir, callbacks=callbacks).code
