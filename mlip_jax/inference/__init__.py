"""Trained models in use: a folder opened, and `encode_image` and `encode_text` behind it."""

from mlip_jax.data.images.preprocessing import ImageLike
from mlip_jax.inference.loading import load
from mlip_jax.inference.model import Model
from mlip_jax.inference.programs import Program

__all__ = ["ImageLike", "Model", "Program", "load"]
