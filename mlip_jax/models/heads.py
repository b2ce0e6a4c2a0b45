"""From a view to the joint space, and what scores pairs there."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from mlip_jax.models.layers import BatchNorm, dense, layer_norm

_TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def normalize(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """L2 norm 1 on the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class LinearHead(nn.Module):
    """Linear projection, without bias unless it is asked for, then L2 norm."""

    dim: int
    dtype: jnp.dtype
    bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch width"], deterministic: bool = True
    ) -> Float[Array, "*batch dim"]:
        init = nn.initializers.normal(x.shape[-1] ** -0.5)
        x = x.astype(self.dtype)
        return normalize(
            dense(x, self.dim, "projection", self.dtype, use_bias=self.bias, kernel_init=init)
        )


def noisy_identity(
    key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "width dim"]:
    """U(-0.01, 0.01) with ones on the diagonal: a projection that starts as a copy."""
    noise = jax.random.uniform(key, shape, dtype, -0.01, 0.01)
    return jnp.where(jnp.eye(*shape, dtype=bool), jnp.ones((), dtype), noise)


class ProjectionBlock(nn.Module):
    """CLIP-Lite's map to the joint space (arXiv 2112.07133), before the L2 norm.

    LayerNorm(Linear(ReLU(BatchNorm(Linear(x)))) + Linear(x)); the last, the shortcut, starts as a
    noisy identity, so that `dim` must be at least the width of x.
    """

    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch width"], deterministic: bool = True
    ) -> Float[Array, "batch dim"]:
        x = x.astype(self.dtype)
        y = dense(x, self.dim, "hidden", self.dtype, use_bias=False, kernel_init=_TORCH_INIT)
        y = jax.nn.relu(BatchNorm(self.dtype, name="norm_hidden")(y, deterministic))
        y = dense(y, self.dim, "output", self.dtype, kernel_init=_TORCH_INIT)
        y = y + dense(x, self.dim, "shortcut", self.dtype, kernel_init=noisy_identity)
        return layer_norm("norm", self.dtype)(y)


class ProjectionHead(nn.Module):
    """`ProjectionBlock`, then L2 norm."""

    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch width"], deterministic: bool = True
    ) -> Float[Array, "batch dim"]:
        return normalize(ProjectionBlock(self.dim, self.dtype, name="block")(x, deterministic))


def _score(x: Array, widths: tuple[int, ...], name: str, dtype: jnp.dtype) -> Array:
    """An MLP with one output, float32; call it in a compact method."""
    x = x.astype(dtype)
    for index, width in enumerate(widths):
        x = dense(x, width, f"hidden_{index}", dtype, kernel_init=_TORCH_INIT)
        x = jax.nn.relu(x)
    return dense(x, 1, name, dtype, kernel_init=_TORCH_INIT)[..., 0].astype(jnp.float32)


class ConcatCritic(nn.Module):
    """Scores pairs by an MLP on both features, one after the other (arXiv 1808.06670)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, one: Float[Array, "*batch width"], other: Float[Array, "*batch other_width"]
    ) -> Float[Array, "*batch"]:
        return _score(jnp.concatenate([one, other], axis=-1), (512, 512), "score", self.dtype)


class PriorDiscriminator(nn.Module):
    """The logit that features come from the prior, uniform on [0, 1) (arXiv 1808.06670)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch"]:
        return _score(x, (1000, 200), "logit", self.dtype)
