"""Where named datasets lie, and what is kept of places elsewhere."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache_dir: str) -> Path:
    """The folder for what can be had again: `cache_dir`, $MLIP_JAX_CACHE or ~/.cache/mlip_jax."""
    chosen = cache_dir or os.environ.get("MLIP_JAX_CACHE", "") or "~/.cache/mlip_jax"
    return Path(chosen).expanduser()
