"""The Frequency Stage: learned filters on the spectrum of the token grid, and one transform twice.

The transform of a grid and its inverse exist as library FFT and as small matrix products. They are
the same linear maps; which is faster is a question to the machine, not to this file.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from mlip_jax.models.dropout import DropPath
from mlip_jax.models.layers import MLP, layer_norm

_PRECISE = jax.lax.Precision.HIGHEST


@functools.cache
def _width_bases(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Real DFT along the width, ortho norm: forward [w, 2, v] and inverse [2, v, w], v = w//2+1.

    The second axis of a spectrum is (real, imaginary). In the inverse every column stands for
    itself and for its mirror image, except the first and, on even widths, the last.
    """
    half = width // 2 + 1
    angle = 2 * np.pi * np.outer(np.arange(width), np.arange(half)) / width
    forward = np.stack([np.cos(angle), -np.sin(angle)], axis=1) / math.sqrt(width)
    weight = np.full(half, 2.0)
    weight[0] = 1.0
    if width % 2 == 0:
        weight[-1] = 1.0
    inverse = np.stack([np.cos(angle), -np.sin(angle)]) * weight / math.sqrt(width)
    return forward.astype(np.float32), inverse.transpose(0, 2, 1).astype(np.float32)


@functools.cache
def _height_basis(height: int) -> np.ndarray:
    """Complex DFT along the height as a real map [h, 2, h, 2], ortho norm.

    It is orthogonal: its transpose is its inverse.
    """
    angle = 2 * np.pi * np.outer(np.arange(height), np.arange(height)) / height
    cosine, sine = np.cos(angle) / math.sqrt(height), np.sin(angle) / math.sqrt(height)
    basis = np.empty((height, 2, height, 2))
    basis[:, 0, :, 0], basis[:, 1, :, 0] = cosine, sine
    basis[:, 0, :, 1], basis[:, 1, :, 1] = -sine, cosine
    return basis.astype(np.float32)


def filter_grid(
    x: Float[Array, "batch rows columns width"],
    kernel: Float[Array, "rows half width 2"],
    transform: str,
) -> Float[Array, "batch rows columns width"]:
    """irfft2(kernel * rfft2(x)), ortho norm: a circular convolution of the grid (GFNet).

    Args:
      x: tokens on their grid, float32.
      kernel: a complex gain for each frequency and channel as (real, imaginary);
        half = columns//2 + 1.
      transform: "fft" or "matmul"; equal up to rounding.
    """
    rows, columns = x.shape[1:3]
    gain_real, gain_imaginary = kernel[..., 0], kernel[..., 1]
    if transform == "fft":
        spectrum = jnp.fft.rfft2(x, axes=(1, 2), norm="ortho")
        spectrum = spectrum * jax.lax.complex(gain_real, gain_imaginary)
        return jnp.fft.irfft2(spectrum, s=(rows, columns), axes=(1, 2), norm="ortho")
    if transform != "matmul":
        raise ValueError(f"transform {transform!r} is neither 'fft' nor 'matmul'")
    forward, inverse = _width_bases(columns)
    height = _height_basis(rows)
    product = functools.partial(jnp.einsum, precision=_PRECISE)
    spectrum = product("brcd,cpv->brpvd", x, forward)
    spectrum = product("brpvd,rpsq->bqsvd", spectrum, height)
    real, imaginary = spectrum[:, 0], spectrum[:, 1]
    filtered = jnp.stack(
        [
            real * gain_real - imaginary * gain_imaginary,
            real * gain_imaginary + imaginary * gain_real,
        ],
        axis=1,
    )
    filtered = product("bqsvd,rpsq->brpvd", filtered, height)
    return product("brpvd,pvc->brcd", filtered, inverse)


def resolve_transform(transform: str) -> str:
    """The transform that "auto" stands for.

    Matrix products: measured faster than the library FFT on CPU cores for grids up to 24 wide,
    and several times so by the TPU compiler's estimate.
    """
    return "matmul" if transform == "auto" else transform


class FrequencyBlock(nn.Module):
    """x + MLP(LN(filter(LN(x)))): one residual, transform in float32 (docs/method.md)."""

    mlp_ratio: float
    activation: str
    dropout: float
    drop_path: float
    transform: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows columns width"], deterministic: bool
    ) -> Float[Array, "batch rows columns width"]:
        rows, columns, width = x.shape[1:]
        kernel = self.param(
            "filter", nn.initializers.normal(0.02), (rows, columns // 2 + 1, width, 2)
        )
        y = layer_norm("norm_filter", jnp.dtype("float32"))(x)
        y = filter_grid(y, kernel, resolve_transform(self.transform))
        y = layer_norm("norm_mlp", self.dtype)(y)
        y = rearrange(y, "b r c d -> b (r c) d")
        y = MLP(self.mlp_ratio, self.activation, self.dropout, self.dtype, name="mlp")(
            y, deterministic
        )
        y = DropPath(self.drop_path)(y, deterministic)
        return x + rearrange(y, "b (r c) d -> b r c d", r=rows)
