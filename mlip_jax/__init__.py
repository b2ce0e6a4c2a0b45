"""Data-efficient language-image pretraining in JAX: MLIP, CLIP-Lite, CLIP, SigLIP and FILIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

__version__ = "0.1.0"


def load(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """A trained model, ready to embed images and texts; see `mlip_jax.inference.load`.

    Args:
      path: a workdir.
      *args: handed on.
      **kwargs: handed on.
    """
    # Here and not above: programs that only read the version or the data start without JAX.
    from mlip_jax import inference

    return inference.load(path, *args, **kwargs)
