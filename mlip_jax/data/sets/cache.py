"""Where datasets lie that the user names by one word."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache_dir: str) -> Path:
    """The folder for named datasets: `cache_dir`, $MLIP_JAX_CACHE or ~/.cache/mlip_jax."""
    chosen = cache_dir or os.environ.get("MLIP_JAX_CACHE", "") or "~/.cache/mlip_jax"
    return Path(chosen).expanduser()
