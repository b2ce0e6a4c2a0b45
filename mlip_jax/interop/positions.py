"""Position embeddings for another grid of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


def resampled(
    position: Float[np.ndarray, "rows columns width"], side: int
) -> Float[np.ndarray, "side side width"]:
    """Positions of a square grid, resampled to another: bicubic with antialiasing.

    As open_clip does it. That interpolation is Keys's with a = -0.5.
    """
    shape = (side, side, position.shape[-1])
    return np.asarray(jax.image.resize(jnp.asarray(position), shape, "cubic", antialias=True))


def fit(params: Mapping[str, Any], side: int) -> dict[str, Any]:
    """Parameters of a two-tower model whose ViT takes a grid of `side` patches a side."""
    encoder = params["image_encoder"]
    if "position" not in encoder or encoder["position"].shape[0] == side:
        return dict(params)
    position = resampled(np.asarray(encoder["position"], np.float32), side)
    return {**params, "image_encoder": {**encoder, "position": position}}
