"""The subcommand train."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from mlip_jax.training import loop


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Trains by `loop.train`; returns the exit code.

    Args:
      config: validated.
      workdir: the run's folder; one that holds this run is resumed.
    """
    return loop.train(config, workdir).code
