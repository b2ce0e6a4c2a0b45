"""Approximate search by usearch, for more images than are compared one by one."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from mlip_jax.core.errors import UserError
from mlip_jax.core.progress import track

EXACT = 1_000_000  # images; above that many, neighbours are looked up
_ROWS = 1 << 16  # added at a time


def check_installed() -> None:
    """Raises UserError where more than `EXACT` images can be neither indexed nor searched."""
    if importlib.util.find_spec("usearch") is None:
        raise UserError(
            f"more than {EXACT:,} images are searched by usearch, which is not installed: "
            "pip install 'mlip_jax[ann]'"
        )


def write(embeddings: Float32[np.ndarray, "images width"], path: Path) -> None:
    """Writes usearch's index (HNSW, arXiv 1603.09320, with its own defaults) of all rows."""
    graph = _graph(embeddings.shape[1])
    for start in track(range(0, len(embeddings), _ROWS), "connecting neighbours"):
        rows = np.ascontiguousarray(embeddings[start : start + _ROWS])
        graph.add(np.arange(start, start + len(rows), dtype=np.uint64), rows)
    graph.save(str(path))


def open_graph(path: Path, width: int) -> Any:
    """usearch's index in a file, memory-mapped."""
    graph = _graph(width)
    graph.view(str(path))
    return graph


def _graph(width: int) -> Any:
    check_installed()
    return importlib.import_module("usearch.index").Index(ndim=width, metric="ip", dtype="f32")
