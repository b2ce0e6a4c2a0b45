"""Position embeddings for another grid of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resized(
    position: Float[Array, "rows columns width"], side: int
) -> Float[Array, "side side width"]:
    """Positions of a square grid, resampled to another: bicubic with antialiasing.

    As open_clip does it. That interpolation is Keys's with a = -0.5.
    """
    return jax.image.resize(position, (side, side, position.shape[-1]), "cubic", antialias=True)


def resampled(
    position: Float[np.ndarray, "rows columns width"], side: int
) -> Float[np.ndarray, "side side width"]:
    """`resized` of a numpy array."""
    return np.asarray(resized(jnp.asarray(position), side))


def fit(params: Mapping[str, Any], side: int) -> dict[str, Any]:
    """Parameters of a two-tower model whose ViT takes a grid of `side` patches a side."""
    encoder = params["image_encoder"]
    if "position" not in encoder or encoder["position"].shape[0] == side:
        return dict(params)
    position = encoder["position"]
    if isinstance(position, jax.Array):
        position = resized(position, side)
    else:
        position = resampled(np.asarray(position, np.float32), side)
    return {**params, "image_encoder": {**encoder, "position": position}}
