"""This package's own folder: safetensors, config and tokenizer; `mlip_jax.load` reads it."""

from __future__ import annotations

from pathlib import Path

from mlip_jax.inference import Model
from mlip_jax.interop import artefact
from mlip_jax.interop.artefact import Artefact


def write(folder: Path, model: Model) -> list[str]:
    """Writes the model, whatever its architecture.

    Args:
      folder: empty.
      model: loaded.

    Returns:
      No notes: nothing is lost.
    """
    parts = (model.config, model.variables, model.tokenizer, model.preprocess)
    exported = Artefact(*parts, model.step, model.about)
    artefact.write(folder, exported)
    return []
